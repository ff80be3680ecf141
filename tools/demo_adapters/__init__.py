"""Makes the adapters that `sidecar demo` ships: trained, checked, written."""
