"""Replicas that share budgets through a real Redis, under a tenant's load in virtual time."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sidecar.access.budgets.budgets import Budgets, Reservation
from sidecar.access.budgets.kept import Kept
from sidecar.access.budgets.leases import EACH_S, Leases
from sidecar.access.budgets.meters import Meter
from sidecar.config.access import Limit
from sidecar.errors import Reason, Refused
from sidecar.state.redis.link import Link

STEP_S = 0.05
AWAY_STEP_S = 5.0
INPUT_TOKENS_MAX = 400
OUTPUT_TOKENS_MEAN = 200
TOKENS_PER_S = 100
"""How fast an engine answers one request: the mean answer takes two seconds."""
WHO = ("acme", "default", "sql")


@dataclass
class Time:
    """A clock that a test moves."""

    now_s: float = 1_800_057_600.0  # a full minute, hour and day

    def __call__(self) -> float:
        return self.now_s


async def killed(kept: Kept) -> None:
    """Have the writer of budgets write nothing more, as after a kill."""
    assert kept._task is not None
    kept._task.cancel()
    await asyncio.wait([kept._task])


@dataclass
class Replica:
    """One replica, and what it has granted: time of admission, input tokens and output tokens of each request."""

    budgets: Budgets
    leases: Leases
    granted: list[tuple[float, int, int]] = field(default_factory=list)
    refused: Counter[Reason] = field(default_factory=Counter)
    _open: list[tuple[float, int, Reservation, int]] = field(default_factory=list)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def request(self, now_s: float, rng: random.Random) -> None:
        """Send a request whose answer has a length that nobody knows; two of three name a far greater one."""
        input_tokens = rng.randint(1, INPUT_TOKENS_MAX)
        output_tokens = 1 + int(rng.expovariate(1 / OUTPUT_TOKENS_MEAN))
        length = rng.choice((None, 1024, 4096))
        output_tokens = output_tokens if length is None else min(output_tokens, length)
        try:
            reservation = self.budgets.reserve(*WHO, input_tokens, length)
        except Refused as refused:
            self.refused[refused.reason] += 1
            return
        self.granted.append((now_s, input_tokens, output_tokens))
        reservation.dispatched()
        ends_s = now_s + 0.2 + output_tokens / TOKENS_PER_S
        heapq.heappush(self._open, (ends_s, next(self._numbers), reservation, output_tokens))

    def end_until(self, now_s: float) -> None:
        """End the requests whose answers are complete."""
        while self._open and self._open[0][0] <= now_s:
            _, _, reservation, output_tokens = heapq.heappop(self._open)
            reservation.settle(None, output_tokens, ran=True)

    @property
    def meter(self) -> Meter:
        """The meter of its only budget."""
        [budget] = self.budgets._budgets.values()
        return budget.meters["tokens_per_minute"]


class Pool:
    """Some replicas and their load: `times` the limit of one tenant, spread by `weights` over the replicas."""

    def __init__(
        self,
        limit: Limit,
        links: Sequence[Link],
        times: float = 4.0,
        weights: Sequence[float] = (1, 1, 1),
        seed: int = 0,
    ) -> None:
        assert limit.tokens_per_minute is not None
        self.limit = limit.tokens_per_minute
        self.clock = Time()
        self.began_s = self.clock.now_s
        self.all: list[Replica] = []
        for number, link in enumerate(links):
            leases = Leases(link, f"replica-{number}", lambda: len(links), self.clock)
            self.all.append(Replica(Budgets([limit], self.clock, leases), leases))
        self.alive = list(self.all)
        self.weights = weights
        self._counts = (int(limit.tokens != "output"), int(limit.tokens != "input"))
        mean = self._counts[0] * INPUT_TOKENS_MAX / 2 + self._counts[1] * OUTPUT_TOKENS_MEAN
        self._rate = times * self.limit / 60 / mean
        self._rng = random.Random(seed)

    async def run(self, until_s: float) -> None:
        """Move the clock in steps; after each, every replica asks Redis as it would in the background."""
        while self.clock.now_s < self.began_s + until_s - STEP_S / 2:
            self.clock.now_s += STEP_S
            for replica in self.alive:
                replica.end_until(self.clock.now_s)
            for replica, weight in zip(self.all, self.weights, strict=True):
                if replica in self.alive:
                    for _ in range(self._arrivals(weight)):
                        replica.request(self.clock.now_s, self._rng)
            for replica in self.alive:
                # A Redis that is away is asked more rarely, for each question takes real time.
                if not replica.leases.is_away or self.clock.now_s % AWAY_STEP_S < STEP_S:
                    await replica.leases.ask(urgent_only=self.clock.now_s % EACH_S >= STEP_S)

    def _arrivals(self, weight: float) -> int:
        """Return how many requests come to a replica in a step (Poisson)."""
        left, count = STEP_S * self._rate * weight / sum(self.weights), 0
        while (left := left - self._rng.expovariate(1)) > 0:
            count += 1
        return count

    def granted(self, first_s: float = 0, last_s: float = float("inf"), of: Sequence[Replica] = ()) -> int:
        """Return the tokens that count of the requests that were admitted within a time from the beginning."""
        times = (first_s + self.began_s - STEP_S / 2, last_s + self.began_s - STEP_S / 2)
        inputs, outputs = self._counts
        return sum(
            inputs * input_tokens + outputs * output_tokens
            for replica in of or self.all
            for at_s, input_tokens, output_tokens in replica.granted
            if times[0] <= at_s < times[1]
        )
