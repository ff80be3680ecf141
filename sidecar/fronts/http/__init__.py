"""HTTP listeners: connections with bounds, probes, metrics, drain."""
