"""Act on engines: run requests, load adapters, watch that they live."""
