"""Endpoint picker of Envoy's external processing: Envoy carries the bytes, the core decides."""
