"""A pool that lives in a Kubernetes cluster: its engines, and the adapters that are declared there."""
