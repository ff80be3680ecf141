"""What it takes to bring an adapter back, as far as a policy that sees only sizes can know."""

from __future__ import annotations

SETUP_NS = 50_000_000
"""To ask the origin, open the files and check them."""
BYTES_PER_S = 2_000_000_000
"""To fetch and pack."""


def refetch_ns(size_bytes: int) -> float:
    """Return the estimated time of a miss: 50 ms and 2 GB/s."""
    return SETUP_NS + size_bytes * 1e9 / BYTES_PER_S
