"""A fuzzer of what clients send: it knows the structure of messages, and nothing of how the sidecar reads them."""
