"""The fixed traces of the golden miss counts, the same on every machine, and the sizes of cache they are run with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sidecar.lab.conformance.eviction import GOLDEN_CAPACITY_BYTES, golden_trace

RANK_8_BYTES = 5_505_024
"""5.25 MiB: an 8B model's attention modules at rank 8 in half precision."""
RANKS = (8, 16, 16, 32, 64, 128)


@dataclass(frozen=True)
class Case:
    """A trace of (key, size) pairs and the cache sizes in bytes, by the name under which counts are checked in."""

    trace: list[tuple[str, int]]
    capacities: dict[str, int]


def numbers(seed: int) -> Iterator[float]:
    """Yield numbers in [0, 1) without end: Knuth's MMIX generator."""
    state = seed
    while True:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        yield (state >> 33) / 2**31


def adapter_trace(length: int = 3000, adapters: int = 60, seed: int = 1) -> list[tuple[str, int]]:
    """Adapters of rank 8 to 128, skewed popularity; every 500 requests three pairs change places, one scan of all."""
    draw = numbers(seed)
    order = list(range(adapters))
    trace: list[tuple[str, int]] = []
    while len(trace) < length:
        if len(trace) % 500 == 499:
            for _ in range(3):
                one, other = int(next(draw) * adapters), int(next(draw) * adapters)
                order[one], order[other] = order[other], order[one]
        if len(trace) == length // 3:
            trace += [_adapter(number) for number in range(adapters)]
        trace.append(_adapter(order[int(adapters * next(draw) ** 3)]))
    return trace[:length]


def _adapter(number: int) -> tuple[str, int]:
    return f"a{number:02d}", RANKS[number % len(RANKS)] // 8 * RANK_8_BYTES


def share_of_all(trace: list[tuple[str, int]], percent: int) -> int:
    return sum(dict(trace).values()) * percent // 100


SMALL, ADAPTERS = golden_trace(), adapter_trace()
CASES = {
    "small": Case(SMALL, {str(size_bytes): size_bytes for size_bytes in (8, GOLDEN_CAPACITY_BYTES, 60)}),
    "adapters": Case(ADAPTERS, {f"{percent} %": share_of_all(ADAPTERS, percent) for percent in (10, 30, 60)}),
}
