"""Ownership by seed: members, a Redis and a network that all fail, then peace in which everything has an owner."""
