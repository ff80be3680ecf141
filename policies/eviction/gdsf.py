"""GreedyDual-Size-Frequency: evict what saves the least refetching time per byte.

Source: Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs report
HPL-98-69R1, 1998: priority `H = L + F * C / S`, where F counts the uses since the key came in, C is the cost of a miss,
S the size and L the H of the last victim. Among equals the least recently used goes first.
"""

from __future__ import annotations

from policies.eviction.cost import refetch_ns
from policies.eviction.greedy_dual import GreedyDual


class GDSF(GreedyDual):
    """A use is worth the refetching time that it saves per byte."""

    def worth(self, size_bytes: int) -> float:
        return refetch_ns(size_bytes) / size_bytes
