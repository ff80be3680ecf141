"""Our own data API, `lorasidecar.v1.Gateway`."""
