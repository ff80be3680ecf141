"""Whose a backend should be: weighted rendezvous hashing.

Every member computes the same order from the same list, and a member that comes or goes moves only its own share.
Highest random weight: Thaler and Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM
Transactions on Networking 6(1), 1998. The score -weight / ln(u) is the logarithmic method of Schindelhauer and
Schomaker, "Weighted distributed hash tables", SPAA 2005: the shares are exactly those of the weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from math import log

from sidecar.ownership.facts import Member

HASH_BITS = 52
"""One less than a float holds: the middle of each interval is exact, and never 0 or 1."""


def order(backend: str, home: str, members: Iterable[Member]) -> list[Member]:
    """Return those who may own a backend, the preferred one first.

    A backend with a `home` is only for the member of that name; draining members are for none.
    """
    able = [member for member in members if not member.draining and home in ("", member.name)]
    return sorted(able, key=lambda member: (-_score(backend, member), member.name, member.id))


def _score(backend: str, member: Member) -> float:
    digest = hashlib.blake2b(f"{len(backend)}:{backend}{member.name}".encode(), digest_size=8).digest()
    uniform = ((int.from_bytes(digest, "big") >> (64 - HASH_BITS)) + 0.5) / 2**HASH_BITS
    return -member.weight / log(uniform)
