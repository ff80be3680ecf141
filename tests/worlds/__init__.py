"""Faults by seed: a world drawn from a number, misfortune while it serves, then peace in which everything must end."""
