"""`sidecar top`: the pool, live, in the terminal."""
