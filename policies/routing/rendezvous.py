"""Rendezvous hashing: every version ranks the backends, and all parties compute the same order without communication.

Highest random weight: Thaler and Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM Transactions
on Networking 6(1), 1998. The weighted form `-w / ln u` is the logarithmic method of Schindelhauer and Schomaker,
"Weighted distributed hash tables", SPAA 2005: the shares are exactly those of the weights. A backend that leaves moves
only the versions that ranked it first, and one that comes back takes exactly those back.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from hashlib import blake2b

KEPT_MAX = 8192
"""How many rankings are cached; past that the cache is cleared."""
HASH_BITS = 52
"""One less than a float holds: the middle of each interval is exact, and never 0 or 1."""


def score(version: str, backend: str, weight: float = 1.0) -> float:
    """Return a backend's score for a version; the largest wins, in proportion to `weight` over many versions.

    It works for any two names of which one chooses the other.
    """
    digest = blake2b(f"{len(version)}:{version}:{backend}".encode(), digest_size=8).digest()
    uniform = ((int.from_bytes(digest, "big") >> (64 - HASH_BITS)) + 0.5) / 2**HASH_BITS
    return -weight / math.log(uniform)


def ranked_equally(version: str, backends: Collection[str]) -> tuple[str, ...]:
    """Return what `ranked` does of backends of equal weights: then the score grows with the hash."""
    return tuple(backend for _, backend in sorted(_hashed(version, backends), reverse=True))


def first_equally(version: str, backends: Collection[str]) -> str:
    """Return the first of `ranked_equally`."""
    return max(_hashed(version, backends))[1] if len(backends) > 1 else next(iter(backends))


def _hashed(version: str, backends: Collection[str]) -> list[tuple[bytes, str]]:
    copy, hashes = blake2b(f"{len(version)}:{version}:".encode(), digest_size=8).copy, []
    for backend in backends:
        hashed = copy()
        hashed.update(backend.encode())
        hashes.append((hashed.digest(), backend))
    return hashes


def ranked(version: str, weights: Mapping[str, float]) -> tuple[str, ...]:
    """Return the backends by descending score; ties by id."""
    return tuple(sorted(weights, key=lambda backend: (-score(version, backend, weights[backend]), backend)))


class Rankings:
    """A cache of `ranked`, for equal weights."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}

    def of(self, version: str, backends: tuple[str, ...]) -> tuple[str, ...]:
        known = self._known.get(version)
        if known is not None and known[0] == backends:
            return known[1]
        if len(self._known) >= KEPT_MAX:
            self._known.clear()
        order = ranked_equally(version, backends)
        self._known[version] = (backends, order)
        return order
