"""HTTP listeners: bounded connections, probes, metrics, drain."""
