"""The registry of adapters' names, which outlives the process, and the members and leases that replicas share."""
