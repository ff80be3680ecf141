"""The cost of bringing an adapter back, estimated from its size alone."""

from __future__ import annotations

SETUP_NS = 50_000_000
"""The time to ask the origin, open the files and check them."""
BYTES_PER_S = 2_000_000_000
"""The rate of fetching and packing."""


def refetch_ns(size_bytes: int) -> float:
    """Return the estimated time of a miss in ns: 50 ms plus the size at 2 GB/s."""
    return SETUP_NS + size_bytes * 1e9 / BYTES_PER_S
