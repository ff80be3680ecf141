"""Capacity plans: from a load and what its users expect to settings of engines and sidecar, with what they rest on."""
