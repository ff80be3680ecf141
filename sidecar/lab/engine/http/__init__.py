"""What the emulated engines with an HTTP API share: texts, prefix blocks, tokens, clients that leave, the server."""
