"""Train, check and write the adapters that `sidecar demo` ships."""
