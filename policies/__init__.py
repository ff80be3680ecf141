"""The choices that can be exchanged: what to evict, what to send next, and where.

A policy is pure: time is an argument, randomness a constructor argument, ties are broken by id. It imports no clock,
no I/O and nothing of `sidecar`. Adding one costs its file and one line in `registry.py`.
"""
