"""Usage: what tenants have used of engines and of the host store, by hour."""
