"""After something went wrong: what to keep of it, and what the journal tells of one request."""
