"""Every version lives on as few backends as its rate needs, and each backend hosts no more versions than it has slots.

A version that is new, or whose hosts are gone, is placed where there is space: where it is already resident, else
where least is in flight for the backend's size; among equals, as in an idle pool, by rendezvous hashing. It stays there
until its backend exceeds its share of slots or tokens (`balancing`), and gains or loses a host when its rate has asked
for that twice in a row (`host_counts`). A request goes to a host. When the hosts are full and exceed their bounded
share of what is in flight (Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads", 2018, as in
HAProxy's `hash-balance-factor`), it may go to the next backend in rank if that is expected to be quicker, and counts
as a vote for another host. The score, work times requests in flight, is that of LMetric (arXiv 2603.15202).

Tried in simulation, uniform and Zipf 1.0, 64 adapters on 4 x 16 slots, 512 in flight: requests sent past their hosts to
a backend whose slots are all taken wait for a slot there and delay others. The 99th percentile of the wait rose from 9
to 30 s and throughput fell by 3 %, so they are not sent there. Moving versions off a backend for its queue alone costs
as much: its queued requests stay, and the version holds two slots for a while. First placement by rendezvous order
under the bounded share, instead of by least in flight, doubles the wait on Zipf.

Cost: a request looks at the hosts of its version. Every few seconds one request pays for a review of all.

The number of hosts of each version: as many as its rate needs, changed by one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from policies.routing.balancing import Balancer
from policies.routing.placement import Home, Placement
from policies.routing.pools import Pool, Share
from policies.routing.rates import DecayedRates
from policies.routing.rendezvous import Rankings, first_equally, ranked_equally
from policies.views import BASE, Candidate, Candidates, Choice, Waiting

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


SECOND_NS = 1_000_000_000
REVIEW_NS = 5 * SECOND_NS
"""How often a pool is balanced."""
SOON_NS = SECOND_NS
"""When a new set of backends is first balanced: by then most popular versions have been requested in it."""
PERIOD_NS = 30 * SECOND_NS
"""How often the number of hosts of each version is reviewed."""
HALF_LIFE_NS = 60 * SECOND_NS
MARGIN = 1.5
"""How many times better than a host another backend must be to get a request."""
TOLERANCE = 0.05
"""The imbalance of token rates that is tolerated, chance aside."""
LOAD_S = 0.1
TOKENS_PER_S = 1000.0
"""The assumed speed of a backend while it is unknown."""
VERSIONS_MAX = 8192
POOLS_MAX = 64
IDLE_NS = 10 * HALF_LIFE_NS


class Partitioned:
    """The placement, the request rates, and the pools in which they were last seen."""

    def __init__(self) -> None:
        self._placement = Placement()
        self._rates = DecayedRates(HALF_LIFE_NS)
        self._requests = DecayedRates(HALF_LIFE_NS)
        self._pools: dict[tuple[str, ...], Pool] = {}
        self._rankings = Rankings()

    @property
    def moves(self) -> int:
        """How many times a version was moved to another host."""
        return self._placement.moves

    def pick(self, request: Waiting, candidates: Candidates, now_ns: int) -> Choice:
        pool = self._pool(candidates, now_ns)
        if request.version == BASE:
            return _for_base(candidates, pool)
        home = self._home(request.version, candidates, pool)
        home.picks += 1
        self._rates.add(request.version, request.output_tokens_max + request.input_tokens / 2, now_ns)
        self._requests.add("", 1.0, now_ns)
        hosts = [candidates[host] for host in home.hosts if host in candidates.backends]
        best = hosts[0] if len(hosts) == 1 else min(hosts, key=lambda one: (*_better(one), one.backend))
        if pool.over_its_share(best, candidates.in_flight):
            other = self._next_in_rank(request.version, home, candidates, pool)
            if other is not None and MARGIN * _score(other) < _score(best):
                home.votes += 1
                return Choice(other.backend, "hosts over their share")
        return Choice(best.backend, "host" if best.resident else "host, to be loaded")

    def _next_in_rank(self, version: str, home: Home, candidates: Candidates, pool: Pool) -> Candidate | None:
        """Return the first backend that is no host, has a free slot and is under its bounded share, or None."""
        for backend in self._rankings.of(version, candidates.backends):
            if backend not in home.hosts and pool.has_room(backend, home.pages, self._placement):
                candidate = candidates[backend]
                if candidate.in_flight < pool.cap(backend, candidates.in_flight):
                    return candidate
        return None

    # Where a version lives.

    def _home(self, version: str, candidates: Candidates, pool: Pool) -> Home:
        """Return the home of a version, with at least one host among the candidates."""
        home = self._placement.homes.get(version)
        if home is None:
            return self._settle(version, candidates, pool)
        if home.pool != candidates.backends and not set(candidates.backends) <= set(home.pool):
            home.pool = candidates.backends
        if not any(host in candidates.backends for host in home.hosts):
            self._placement.move(version, home.hosts[0], self._host_for(version, home.pages, candidates, pool))
        return home

    def _settle(self, version: str, candidates: Candidates, pool: Pool) -> Home:
        if len(self._placement.homes) >= VERSIONS_MAX:
            self._forget_the_oldest(max(1, VERSIONS_MAX // 4))
        pages = max(1, candidates[candidates.backends[0]].pages)
        host = self._host_for(version, pages, candidates, pool)
        home = Home([host], pages, candidates.rank, candidates.backends)
        self._placement.add(version, home)
        return home

    def _host_for(self, version: str, pages: int, candidates: Candidates, pool: Pool) -> str:
        """Return a backend for a version without hosts: where it is already resident, else by load."""
        in_flights = candidates.in_flights()
        ranks = [held / share.weight for held, share in zip(in_flights, pool.shares.values(), strict=True)]
        far = dict(zip(candidates.backends, ranks, strict=True))
        near = {
            backend: far.pop(backend)
            for backend in candidates.residents()
            if candidates[backend].in_flight < pool.cap(backend, candidates.in_flight)
        }
        order = (backend for ranked in (near, far) if ranked for backend in _least_first(version, ranked))
        return pool.first_with_room(order, pages, self._placement)

    def _forget_the_oldest(self, count: int) -> None:
        oldest = sorted(self._placement.homes, key=lambda version: (self._rates.last_ns(version), version))
        for version in oldest[:count]:
            self._forget(version)

    def _forget_the_idle(self, now_ns: int) -> None:
        for version in list(self._placement.homes):
            if self._rates.last_ns(version) < now_ns - IDLE_NS:
                self._forget(version)

    def _forget(self, version: str) -> None:
        self._placement.forget(version)
        self._rates.forget(version)

    # Now and then.

    def _pool(self, candidates: Candidates, now_ns: int) -> Pool:
        """Return the pool of these backends, reviewed if that is due. A new set is reviewed at once."""
        pool = self._pools.get(candidates.backends)
        if pool is None:
            if len(self._pools) >= POOLS_MAX:
                del self._pools[min(self._pools, key=lambda known: (self._pools[known].review_ns, known))]
            pool = self._pools[candidates.backends] = Pool({}, 0.0, now_ns, now_ns + PERIOD_NS)
            self._review(pool, candidates, now_ns)
            pool.review_ns = now_ns + SOON_NS
        if now_ns >= pool.review_ns:
            self._review(pool, candidates, now_ns)
        return pool

    def _review(self, pool: Pool, candidates: Candidates, now_ns: int) -> None:
        pool.review_ns = now_ns + REVIEW_NS
        pool.measure(candidates)
        if now_ns >= pool.count_ns:
            pool.count_ns = now_ns + PERIOD_NS
            self._forget_the_idle(now_ns)
            HostCounter(self._placement, self._rankings, pool).count(self._rates, now_ns)
        balancer = Balancer(
            self._placement, pool.shares, lambda version: self._rates.rate(version, now_ns), self._rankings
        )
        balancer.even_pages()
        seen = self._requests.total("", now_ns) / len(pool.shares)
        balancer.even_rates(TOLERANCE + 2 / math.sqrt(1 + seen))

    def backend_removed(self, backend: str) -> None:
        """Remove a backend from the hosts of versions with other hosts; the rest move when next requested.

        Otherwise it would count as a host for ever.
        """
        for version, home in self._placement.homes.items():
            if backend in home.hosts and len(home.hosts) > 1:
                self._placement.drop_host(version, backend)
        self._pools = {backends: pool for backends, pool in self._pools.items() if backend not in backends}

    def snapshot(self) -> Any:
        pools = [
            [
                list(backends),
                [[one, share.weight, share.pages] for one, share in pool.shares.items()],
                [pool.tokens_per_s, pool.review_ns, pool.count_ns, pool.turn],
            ]
            for backends, pool in self._pools.items()
        ]
        return [self._placement.snapshot(), self._rates.snapshot(), self._requests.snapshot(), pools]

    def restore(self, state: Any) -> None:
        placement, rates, requests, pools = state
        self._placement.restore(placement)
        self._rates.restore(rates)
        self._requests.restore(requests)
        self._pools = {
            tuple(backends): Pool({one: Share(weight, pages) for one, weight, pages in shares}, *rest)
            for backends, shares, rest in pools
        }


def _least_first(version: str, ranks: dict[str, float]) -> Iterator[str]:
    """Yield backends by ascending rank, ties by rendezvous hashing. Mostly the first is taken: it is found at once."""
    least = min(ranks.values())
    first = first_equally(version, [backend for backend, rank in ranks.items() if rank == least])
    yield first
    rest = [backend for backend in ranked_equally(version, ranks) if backend != first]
    yield from sorted(rest, key=ranks.__getitem__)


def _score(candidate: Candidate) -> float:
    """Return a cost to compare backends by, smaller is better: seconds of work times the requests that share them."""
    seconds = candidate.work_tokens / (candidate.tokens_per_s or TOKENS_PER_S)
    if not candidate.open and candidate.slots_free == 0:
        seconds *= 2  # a slot is free once the present runs have ended
    if not candidate.resident:
        seconds += LOAD_S
    return seconds * (candidate.in_flight + 1)


def _better(candidate: Candidate) -> tuple[float, int]:
    return _score(candidate), candidate.in_flight


def _for_base(candidates: Candidates, pool: Pool) -> Choice:
    """Send a base request to the better of two backends; the pairs alternate."""
    backends = sorted(candidates.backends)
    pool.turn += 1
    two = [backends[(pool.turn + step) % len(backends)] for step in range(2)]
    return Choice(min((candidates[one] for one in two), key=_better).backend, "base model, better of two")
