"""Kubernetes: discover a Service's engines, and serve the adapters that a namespace declares."""
