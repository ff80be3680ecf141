"""A set of candidate backends: each one's share of slots, of the work and of what is in flight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from policies.routing.placement import Placement
from policies.views import Candidate, Candidates

SLACK = 0.25
"""A backend may exceed its share of what is in flight by this fraction before hosts are passed over."""


@dataclass(frozen=True)
class Share:
    """What one backend of a pool may be given."""

    weight: float
    """Its fraction of the pool's work; the fractions add up to 1."""
    pages: int | None
    """Pages that may be open at once; None while unknown."""


class Rooms:
    """The pages that may be placed on each backend so that all that are wanted fit.

    That is what each can have open, if it suffices. If not, or if it is unknown, the excess is spread in proportion, so
    that waiting for slots is the same everywhere.
    """

    def __init__(self, shares: dict[str, Share]) -> None:
        known = {backend: share.pages for backend, share in shares.items() if share.pages is not None}
        usual = max(1, sum(known.values()) // len(known)) if known else 1
        self._all_known = len(known) == len(shares)
        self._sizes = {backend: known.get(backend, usual) for backend in shares}
        self._total = max(1, sum(self._sizes.values()))

    def of(self, backend: str, pages_wanted: int) -> int:
        """Return the pages that a backend may have when all of them are to have `pages_wanted`."""
        size = self._sizes[backend]
        if self._all_known and pages_wanted <= self._total:
            return size
        return -(-size * pages_wanted // self._total)


@dataclass
class Pool:
    """One set of backends, when it is next reviewed and counted, and the counter that alternates base requests."""

    shares: dict[str, Share]
    tokens_per_s: float
    """The output of all of them; 0 while unknown."""
    review_ns: int
    count_ns: int
    turn: int = 0
    rooms: Rooms = field(init=False)

    def __post_init__(self) -> None:
        self.rooms = Rooms(self.shares)

    def measure(self, candidates: Candidates) -> None:
        """Measure every candidate: the pages that it can have open, and its share of the work by speed or by seats."""
        offered = list(candidates)
        speeds = [one.tokens_per_s for one in offered]
        known = all(speed > 0 for speed in speeds)
        sizes = speeds if known else [float(max(1, one.seats)) for one in offered]
        self.tokens_per_s = sum(speeds) if known else 0.0
        self.shares = {
            one.backend: Share(size / sum(sizes), None if one.slots is None else one.slots * max(1, one.pages))
            for one, size in zip(offered, sizes, strict=True)
        }
        self.rooms = Rooms(self.shares)

    def cap(self, backend: str, in_flight: int) -> int:
        """Return how many requests a backend may have before its versions may go elsewhere."""
        return math.ceil((1 + SLACK) * (in_flight + 1) * self.shares[backend].weight)

    def over_its_share(self, host: Candidate, in_flight: int) -> bool:
        """Return True if a host has no free seat and exceeds its bounded share: a request would wait there."""
        return host.in_flight >= host.seats and host.in_flight >= self.cap(host.backend, in_flight)

    def has_room(self, backend: str, pages: int, placement: Placement) -> bool:
        """Return True if a backend can open everything placed on it and this many pages more."""
        limit = self.shares[backend].pages
        return limit is None or placement.pages.get(backend, 0) + pages <= limit

    def first_with_room(self, order: Iterable[str], pages: int, placement: Placement) -> str:
        """Return the first backend in `order` that may be given the pages; the very first if none may."""
        held, passed = placement.pages, list[str]()
        wanted = sum(count for backend, count in held.items() if backend in self.shares) + pages
        for backend in order:
            if held.get(backend, 0) + pages <= self.rooms.of(backend, wanted):
                return backend
            passed.append(backend)
        return passed[0]
