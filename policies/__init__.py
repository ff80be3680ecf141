"""The exchangeable choices: what to evict, what to send next, where to send it, and what to prefetch.

A policy is pure: time is an argument, randomness a constructor argument, ties are broken by id. It imports no clock,
no I/O and nothing of `sidecar`. Adding one takes a file and a line in `registry.py`.
"""
