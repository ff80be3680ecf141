"""The driver (inbox, step, effects), the gateway, the store's bytes, metrics and the request log."""
