"""Fault simulation of ownership by seed: members, Redis and the network fail; then every backend must be owned."""
