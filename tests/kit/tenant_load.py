"""Replicas that share budgets through a real Redis, under a tenant's load in virtual time."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

from sidecar.access.budgets.budgets import Budgets, Reservation
from sidecar.access.budgets.leases import Leases
from sidecar.config.access import Limit
from sidecar.errors import Reason, Refused
from sidecar.state.redis.link import Link

STEP_S = 0.05
INPUT_TOKENS_MAX = 400
OUTPUT_TOKENS_MEAN = 200
TOKENS_MEAN = INPUT_TOKENS_MAX / 2 + OUTPUT_TOKENS_MEAN
TOKENS_PER_S = 100
"""How fast an engine answers one request: the mean answer takes two seconds."""


@dataclass
class Time:
    """A clock that a test moves."""

    now_s: float = 1_800_057_600.0  # a full minute, hour and day

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Replica:
    """One replica, and what it has granted: the tokens of each admitted request, by the time of its admission."""

    budgets: Budgets
    leases: Leases
    granted: list[tuple[float, int]] = field(default_factory=list)
    refused: Counter[Reason] = field(default_factory=Counter)
    _open: list[tuple[float, int, Reservation, int]] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def request(self, now_s: float, rng: random.Random) -> None:
        """Send a request whose answer has a length that nobody knows; two of three name a far greater one."""
        input_tokens = rng.randint(1, INPUT_TOKENS_MAX)
        output_tokens = min(4096, 1 + int(rng.expovariate(1 / OUTPUT_TOKENS_MEAN)))
        length = rng.choice((None, 1024, 4096))
        output_tokens = output_tokens if length is None else min(output_tokens, length)
        try:
            reservation = self.budgets.reserve("acme", "default", "sql", input_tokens, length)
        except Refused as refused:
            self.refused[refused.reason] += 1
            return
        self.granted.append((now_s, input_tokens + output_tokens))
        reservation.dispatched()
        ends_s = now_s + 0.2 + output_tokens / TOKENS_PER_S
        heapq.heappush(self._open, (ends_s, next(self._numbers), reservation, output_tokens))

    def end_until(self, now_s: float) -> None:
        """End the requests whose answers are complete."""
        while self._open and self._open[0][0] <= now_s:
            _, _, reservation, output_tokens = heapq.heappop(self._open)
            reservation.settle(None, output_tokens, ran=True)


class Pool:
    """Some replicas and their load: `times` the limit of one tenant, spread by `weights` over the replicas."""

    def __init__(self, limit: Limit, links: list[Link], times: float, weights: tuple[float, ...], seed: int) -> None:
        assert limit.tokens_per_minute is not None
        self.clock = Time()
        self.began_s = self.clock.now_s
        self.replicas = []
        for number, link in enumerate(links):
            leases = Leases(link, f"replica-{number}", lambda: len(links), self.clock)
            self.replicas.append(Replica(Budgets([limit], self.clock, leases), leases))
        self.all = list(self.replicas)
        self._rate = times * limit.tokens_per_minute / 60 / TOKENS_MEAN
        self._weights = weights
        self._rng = random.Random(seed)

    async def run(self, seconds: float) -> None:
        """Move the clock in steps; after each, every replica asks Redis once, as it would in the background."""
        for _ in range(round(seconds / STEP_S)):
            self.clock.now_s += STEP_S
            for replica in self.replicas:
                replica.end_until(self.clock.now_s)
            for replica, weight in zip(self.all, self._weights, strict=True):
                if replica in self.replicas:
                    for _ in range(self._arrivals(weight)):
                        replica.request(self.clock.now_s, self._rng)
            for replica in self.replicas:
                await replica.leases.ask()

    def _arrivals(self, weight: float) -> int:
        """Return how many requests come to a replica in a step (Poisson)."""
        left, count = STEP_S * self._rate * weight / sum(self._weights), 0
        while (left := left - self._rng.expovariate(1)) > 0:
            count += 1
        return count

    def granted(self, first_s: float = 0, last_s: float = float("inf")) -> int:
        """Return the tokens of the requests that were admitted within a time from the beginning."""
        times = (first_s + self.began_s, last_s + self.began_s)
        return sum(tokens for replica in self.all for at_s, tokens in replica.granted if times[0] < at_s <= times[1])
