"""Several replicas of one pool: backend ownership, and requests forwarded to the owning replica."""
