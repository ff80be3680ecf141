"""The number of hosts of each version: as many as its rate needs, changed by one at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from policies.routing.placement import Home, Placement
from policies.routing.pools import Pool
from policies.routing.rates import DecayedRates
from policies.routing.rendezvous import Rankings

BUSY = 0.6
"""The fraction of a backend that one version may use before it gets another host."""
ALONE = 0.9
"""The fraction at which it gets one even where no slot is free."""
VOTES = 0.1
"""The fraction of a version's requests sent past its hosts that counts as a vote for another host."""
STREAK = 2
"""How many consecutive counts must agree."""


@dataclass
class HostCounter:
    """One count over a pool."""

    placement: Placement
    rankings: Rankings
    pool: Pool

    def count(self, rates: DecayedRates, now_ns: int) -> None:
        """Give each version that lives in the pool one host more or less if its rate says so repeatedly.

        A rate is taken relative to the sum of rates, and that to the pool's speed: requested tokens exceed generated
        ones by a factor that all versions share.
        """
        homes = self.placement.homes
        of = {one: rates.rate(one, now_ns) for one, home in homes.items() if home.hosts[0] in self.pool.shares}
        total = sum(of.values())
        busy = min(1.0, total / self.pool.tokens_per_s) if self.pool.tokens_per_s else 1.0
        for version in sorted(of, key=lambda one: (-of[one], one)):
            part = of[version] / total * busy * len(self.pool.shares) if total else 0.0
            self._count_one(version, homes[version], part)

    def _count_one(self, version: str, home: Home, part: float) -> None:
        """Count one version; `part` is its rate in backends, so that 1.5 needs one and a half."""
        wanted = max(1, math.ceil(part / BUSY))
        if home.picks and home.votes > VOTES * home.picks:
            wanted = max(wanted, len(home.hosts) + 1)
        home.picks = home.votes = 0
        sign = (wanted > len(home.hosts)) - (wanted < len(home.hosts))
        home.streak = sign if sign * home.streak <= 0 else home.streak + sign
        if abs(home.streak) < STREAK:
            return
        home.streak = 0
        if sign > 0:
            self._add_host(version, home, part)
        else:
            self._drop_host(version, home)

    def _add_host(self, version: str, home: Home, part: float) -> None:
        order = [one for one in self.rankings.of(version, home.pool) if one in self.pool.shares]
        able = [backend for backend in order if backend not in home.hosts]
        if not able:
            return
        host = self.pool.first_with_room(able, home.pages, self.placement)
        if self.pool.has_room(host, home.pages, self.placement) or part / len(home.hosts) > ALONE:
            self.placement.add_host(version, host)

    def _drop_host(self, version: str, home: Home) -> None:
        order = self.rankings.of(version, home.pool)
        last = max(home.hosts, key=lambda one: (order.index(one) if one in order else len(order), one))
        self.placement.drop_host(version, last)
