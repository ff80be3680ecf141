"""Upper bounds of what is reachable: the first figures in every table.

All rest on one model of an engine. With b requests running a step takes t(b) and gives each a token, and each prompt
stops the batch for P: a request of L tokens costs the engine L · t(b) / b + P, and so

    X(b) = L / (L · t(b) / b + P)    tokens per second.

The size of b depends on order and placement. An engine with S slots serves N adapters of equal share from a pool of C
requests. A waiting adapter's queue grows from nothing to the q requests that an open one runs, so that C = S · q +
(N - S) · q / 2, and b = S · q = 2 · S · C / (N + S): the grouping ceiling. Only a deeper pool, more slots or fewer
adapters on each engine moves it. Seats and KV memory cap b besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepTimes:
    """An engine's pace in ms: a decode step by batch and mean context, a prompt by its tokens."""

    step_ms: Callable[[float, float], float]
    prefill_ms: Callable[[float], float]


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a request. `reserved_tokens` is the KV space reserved for it; 0 means input and output."""

    input_tokens: float
    output_tokens: float
    reserved_tokens: float = 0.0

    @property
    def context(self) -> float:
        """KV tokens that a running request holds half-way through."""
        return self.input_tokens + self.output_tokens / 2

    @property
    def kept_tokens(self) -> float:
        return self.reserved_tokens or self.input_tokens + self.output_tokens


@dataclass(frozen=True)
class Engines:
    """`count` equal engines; the other numbers are those of one."""

    seats: float
    slots: int
    kv_tokens: float = math.inf
    count: int = 1


@dataclass(frozen=True)
class Reachable:
    """The mean batch of one engine and the output tokens per second of all."""

    batch: float
    tokens_per_s: float


def tokens_per_s(times: StepTimes, lengths: Lengths, batch: float) -> float:
    """Return X(b), one engine's output tokens per second with this many requests running."""
    decode_ms = lengths.output_tokens * times.step_ms(batch, lengths.context) / batch
    return 1000 * lengths.output_tokens / (decode_ms + times.prefill_ms(lengths.input_tokens))


def full_batch(lengths: Lengths, engines: Engines) -> float:
    """Return the largest batch of one engine: its seats, or what its KV memory holds."""
    return min(engines.seats, engines.kv_tokens / lengths.kept_tokens)


def closed_form(times: StepTimes, lengths: Lengths, engines: Engines, adapters: int, in_flight: float) -> Reachable:
    """Return what grouping can reach if all adapters have the same share; b as above.

    Several engines hold equal parts of the adapters and of the requests. `in_flight` is all that is outstanding, queued
    or running; infinite for an endless backlog. It is a model of queues: with fewer than (N + S) / 2 outstanding there
    are none, and first come first served already runs one request per slot, which is more.
    """
    slots, hosted = min(engines.slots, adapters), max(1.0, adapters / engines.count)
    ceiling = in_flight / engines.count * (2 * slots / (hosted + slots) if slots < hosted else 1)
    return _reached(times, lengths, engines, ceiling)


def all_resident(times: StepTimes, lengths: Lengths, engines: Engines, in_flight: float = math.inf) -> Reachable:
    """Return what the same requests would reach if every adapter had a slot: b = min(seats, KV, C)."""
    return _reached(times, lengths, engines, in_flight / engines.count)


def fluid(times: StepTimes, lengths: Lengths, engines: Engines, shares: Sequence[float], in_flight: float) -> Reachable:
    """Return what grouping can reach with any shares p_i, on one engine or each of several equal ones.

    Adapter i is open for a fraction θ_i of the time, and then runs p_i · b / θ_i requests. One visit serves what
    arrived since the last, so its queue holds p_i · b · (1 - θ_i) / (2 · θ_i) on average; with equal shares that is the
    model above. All slots together: Σθ_i ≤ S. The pool holds b · Σ p_i · (1 + 1/θ_i) / 2 ≤ C. The smallest pool has θ_i
    = min(1, c · √p_i) by Lagrange, and c is found by bisection.
    """
    asked = [share for share in shares if share > 0]
    open_parts = _open_parts(asked, engines.slots)
    pool_of_one = sum(share * (1 + 1 / part) / 2 for share, part in zip(asked, open_parts, strict=True))
    return _reached(times, lengths, engines, in_flight / engines.count / pool_of_one if asked else in_flight)


def _reached(times: StepTimes, lengths: Lengths, engines: Engines, ceiling: float) -> Reachable:
    batch = min(full_batch(lengths, engines), ceiling)
    return Reachable(batch, tokens_per_s(times, lengths, batch) * engines.count)


def _open_parts(shares: Sequence[float], slots: int) -> list[float]:
    """Return θ_i = min(1, c · √p_i) with the sum S; 1 each if all fit."""
    if slots >= len(shares):
        return [1.0] * len(shares)
    roots = [math.sqrt(share) for share in shares]
    low, high = 0.0, 1 / min(roots)
    for _ in range(100):
        middle = (low + high) / 2
        if sum(min(1.0, middle * root) for root in roots) < slots:
            low = middle
        else:
            high = middle
    return [min(1.0, high * root) for root in roots]
