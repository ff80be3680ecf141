"""Fault simulation by seed: a world drawn from a number, faults while it serves, then peace, in which all must end."""
