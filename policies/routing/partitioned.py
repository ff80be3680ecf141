"""Every version lives on as few backends as its rate needs, and each backend hosts no more than it has slots for.

Weighted rendezvous hashing places a version that is new or whose hosts are gone; a placement then stays until its
backend has more than its share of slots or tokens (`balancing`), and a version gets one host more, or one less, when
its rate has asked for that twice in a row. A request goes to a host. When those have more than their bounded share of
what is in flight (Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads", 2018, as in HAProxy's
`hash-balance-factor`) it may go to the next backend in rank if that is expected to be quicker, loading and waiting for
a slot included, and counts as a vote for another host. The score to compare by, work times requests in flight, is that
of LMetric (arXiv 2603.15202): there is nothing in it to tune.

Cost: a request looks at the hosts of its version. Every few seconds one request pays for a look at all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from policies.routing.balancing import Balancer
from policies.routing.placement import Home, Placement, Share, rooms
from policies.routing.rates import DecayedRates
from policies.routing.rendezvous import Rankings
from policies.views import BASE, Candidate, Candidates, Choice, Waiting

SECOND_NS = 1_000_000_000
REVIEW_NS = 5 * SECOND_NS
"""How often a pool is evened out."""
PERIOD_NS = 30 * SECOND_NS
"""How often the number of hosts of each version is looked at."""
HALF_LIFE_NS = 60 * SECOND_NS
SLACK = 0.25
"""A backend may have this much more than its share of what is in flight before hosts are passed over."""
MARGIN = 1.5
"""How many times better than a host another backend must be to be given a request."""
MARGIN_WHEN_FULL = 4.0
"""The same where every slot is spoken for: what is displaced there has to be loaded again too."""
BUSY = 0.6
"""The part of a backend that one version may take before it gets another host."""
ALONE = 0.9
"""The part that makes it get one even where no slot is free for it."""
TOLERANCE = 0.1
"""An imbalance of token rates that is let be, chance aside."""
LOAD_S = 0.1
VOTES = 0.1
"""The part of a version's requests that must have gone past its hosts to count as wanting another."""
TOKENS_PER_S = 1000.0
"""What a backend is taken to produce while nobody knows."""
VERSIONS_MAX = 8192
IDLE_NS = 10 * HALF_LIFE_NS


@dataclass
class Pool:
    """One set of backends that requests were offered, and when it is to be looked at again."""

    shares: dict[str, Share]
    tokens_per_s: float
    """What all of them can do; 0 while that is not known."""
    review_ns: int
    count_ns: int
    turn: int = 0


class Partitioned:
    """Placement, rates and the pools they were last seen in."""

    def __init__(self) -> None:
        self._placement = Placement()
        self._rates = DecayedRates(HALF_LIFE_NS)
        self._requests = DecayedRates(HALF_LIFE_NS)
        self._pools: dict[tuple[str, ...], Pool] = {}
        self._rankings = Rankings()

    @property
    def moves(self) -> int:
        """How often a version was given another host, ever."""
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
        best = hosts[0] if len(hosts) == 1 else min(hosts, key=_score)
        if _is_over_its_share(best, candidates, pool):
            other = self._next_in_rank(request.version, home, candidates, pool)
            if other is not None and self._margin(other, home, pool) * _score(other)[0] < _score(best)[0]:
                home.votes += 1
                return Choice(other.backend, "hosts over their share")
        return Choice(best.backend, "host" if best.resident else "host, to be loaded")

    def _next_in_rank(self, version: str, home: Home, candidates: Candidates, pool: Pool) -> Candidate | None:
        """Return the first backend that is no host and has less than its bounded share."""
        for backend in self._rankings.of(version, candidates.backends):
            if backend not in home.hosts:
                candidate = candidates[backend]
                if candidate.in_flight < _cap(backend, candidates, pool):
                    return candidate
        return None

    def _margin(self, candidate: Candidate, home: Home, pool: Pool) -> float:
        """Return how many times better than a host another backend must be."""
        if candidate.resident or self._has_room(candidate.backend, home.pages, pool):
            return MARGIN
        return MARGIN_WHEN_FULL

    def _has_room(self, backend: str, pages: int, pool: Pool) -> bool:
        """Whether a backend can have everything open that is placed on it, and this many pages more."""
        limit = pool.shares[backend].pages
        return limit is None or self._placement.pages.get(backend, 0) + pages <= limit

    # Where a version lives.

    def _home(self, version: str, candidates: Candidates, pool: Pool) -> Home:
        """Return the home of a version, with at least one host that is a candidate."""
        home = self._placement.homes.get(version)
        if home is None:
            return self._settle(version, candidates, pool)
        home.pool = candidates.backends
        if not any(host in candidates.backends for host in home.hosts):
            target = self._first_with_room(version, home.pages, (), candidates.backends, pool)
            self._placement.move(version, home.hosts[0], target)
        return home

    def _settle(self, version: str, candidates: Candidates, pool: Pool) -> Home:
        if len(self._placement.homes) >= VERSIONS_MAX:
            self._forget_the_oldest(VERSIONS_MAX // 4)
        backends = candidates.backends
        pages = max(1, candidates[backends[0]].pages)
        host = self._first_with_room(version, pages, (), backends, pool)
        home = Home([host], pages, candidates.rank, backends)
        self._placement.add(version, home)
        return home

    def _first_with_room(
        self, version: str, pages: int, hosts: tuple[str, ...], backends: tuple[str, ...], pool: Pool
    ) -> str:
        held = {backend: self._placement.pages.get(backend, 0) for backend in pool.shares}
        room = rooms(pool.shares, sum(held.values()) + pages)
        order = [backend for backend in self._rankings.of(version, backends) if backend not in hosts]
        roomy = (backend for backend in order if held[backend] + pages <= room[backend])
        return next(roomy, order[0])

    def _forget_the_oldest(self, count: int) -> None:
        oldest = sorted(self._placement.homes, key=lambda version: (self._rates.last_ns(version), version))
        for version in oldest[:count]:
            self._forget(version)

    def _forget(self, version: str) -> None:
        self._placement.forget(version)
        self._rates.forget(version)

    # Now and then.

    def _pool(self, candidates: Candidates, now_ns: int) -> Pool:
        """Return the pool of these backends, looked over if that is due. A set not seen before is due at once."""
        pool = self._pools.get(candidates.backends)
        if pool is None:
            if len(self._pools) >= 64:
                del self._pools[min(self._pools, key=lambda known: (self._pools[known].review_ns, known))]
            pool = self._pools[candidates.backends] = Pool({}, 0.0, now_ns, now_ns + PERIOD_NS)
        if now_ns >= pool.review_ns:
            pool.review_ns = now_ns + REVIEW_NS
            _measure(pool, candidates)
            if now_ns >= pool.count_ns:
                pool.count_ns = now_ns + PERIOD_NS
                self._forget_the_idle(now_ns)
                self._count_hosts(pool, now_ns)
            self._even_out(pool, now_ns)
        return pool

    def _even_out(self, pool: Pool, now_ns: int) -> None:
        balancer = self._balancer(pool, now_ns)
        balancer.budget = max(2, len(balancer.rates) // 16)
        balancer.even_pages()
        seen = self._requests.rate("", now_ns) * self._requests.window_s / len(pool.shares)
        balancer.even_rates(TOLERANCE + 2 / math.sqrt(1 + seen))

    def _balancer(self, pool: Pool, now_ns: int) -> Balancer:
        return Balancer(
            self._placement, pool.shares, lambda version: self._rates.rate(version, now_ns), self._rankings, 0
        )

    def _forget_the_idle(self, now_ns: int) -> None:
        for version in list(self._placement.homes):
            if self._rates.last_ns(version) < now_ns - IDLE_NS:
                self._forget(version)

    def _count_hosts(self, pool: Pool, now_ns: int) -> None:
        """Give each version one host more or less, if its rate says so for the second time in a row."""
        members = [version for version, home in self._placement.homes.items() if home.hosts[0] in pool.shares]
        rates = {version: self._rates.rate(version, now_ns) for version in members}
        total = sum(rates.values())
        busy = min(1.0, total / pool.tokens_per_s) if pool.tokens_per_s else 1.0
        for version in sorted(members, key=lambda one: (-rates[one], one)):
            home = self._placement.homes[version]
            part = rates[version] / total * busy * len(pool.shares) if total else 0.0
            self._count_hosts_of(version, home, part, pool)

    def _count_hosts_of(self, version: str, home: Home, part: float, pool: Pool) -> None:
        """`part` is the rate in backends: 1.5 is what one backend and a half can do."""
        wanted = max(1, math.ceil(part / BUSY))
        if home.picks and home.votes > VOTES * home.picks:
            wanted = max(wanted, len(home.hosts) + 1)
        home.picks = home.votes = 0
        sign = (wanted > len(home.hosts)) - (wanted < len(home.hosts))
        home.streak = sign if sign * home.streak <= 0 else home.streak + sign
        if abs(home.streak) < 2:
            return
        home.streak = 0
        if sign < 0:
            self._drop_host(version, home)
        else:
            self._add_host(version, home, part, pool)

    def _add_host(self, version: str, home: Home, part: float, pool: Pool) -> None:
        able = tuple(backend for backend in home.pool if backend in pool.shares)
        if all(backend in home.hosts for backend in able):
            return
        host = self._first_with_room(version, home.pages, tuple(home.hosts), able, pool)
        if self._has_room(host, home.pages, pool) or part / len(home.hosts) > ALONE:
            self._placement.add_host(version, host)

    def _drop_host(self, version: str, home: Home) -> None:
        order = self._rankings.of(version, home.pool)
        last = max(home.hosts, key=lambda one: (order.index(one) if one in order else len(order), one))
        self._placement.drop_host(version, last)

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


def _measure(pool: Pool, candidates: Candidates) -> None:
    """Look at every candidate: what it can have open, and its part of the work by speed, or by seats."""
    offered = list(candidates)
    speeds = [one.tokens_per_s for one in offered]
    known = all(speed > 0 for speed in speeds)
    sizes = speeds if known else [float(max(1, one.seats)) for one in offered]
    pool.tokens_per_s = sum(speeds) if known else 0.0
    pool.shares = {
        one.backend: Share(size / sum(sizes), None if one.slots is None else one.slots * max(1, one.pages))
        for one, size in zip(offered, sizes, strict=True)
    }


def _cap(backend: str, candidates: Candidates, pool: Pool) -> int:
    """Return the requests that a backend may have before its versions may go elsewhere."""
    return math.ceil((1 + SLACK) * (candidates.in_flight + 1) * pool.shares[backend].weight)


def _is_over_its_share(host: Candidate, candidates: Candidates, pool: Pool) -> bool:
    """Whether a host has more than its bounded share, and enough for that to be felt.

    A batch less than half full is not: one request more costs its engine next to nothing.
    """
    return 2 * host.in_flight >= host.seats and host.in_flight >= _cap(host.backend, candidates, pool)


def _score(candidate: Candidate) -> tuple[float, str]:
    """Return what a request may expect there, the smaller the better: seconds of work times those who share them."""
    seconds = candidate.work_tokens / (candidate.tokens_per_s or TOKENS_PER_S)
    if not candidate.open and candidate.slots_free == 0:
        seconds *= 2  # a slot is free when what runs now has ended
    if not candidate.resident:
        seconds += LOAD_S
    return (seconds * (candidate.in_flight + 1), candidate.backend)


def _for_base(candidates: Candidates, pool: Pool) -> Choice:
    """Send a request that needs no adapter to the better of two backends; each two get their turn."""
    backends = sorted(candidates.backends)
    pool.turn += 1
    two = [backends[(pool.turn + step) % len(backends)] for step in range(2)]
    return Choice(min((candidates[one] for one in two), key=_score).backend, "base model, better of two")
