"""Miss counts of every eviction policy on a small fixed trace: a change of behaviour shows as a number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from policies.registry import POLICIES
from sidecar.conformance.eviction import GOLDEN_CAPACITY_BYTES, golden_trace, misses_of
from sidecar.plugins import resolve

COUNTS: dict[str, dict[str, int]] = json.loads((Path(__file__).parent / "miss_counts.json").read_text())
CAPACITIES = [8, GOLDEN_CAPACITY_BYTES, 60]
Trace = list[tuple[str, int]]


def slow_misses(trace: Trace, capacity_bytes: int, worth: Callable[[str, int, Trace], tuple[int, ...]]) -> int:
    """Count misses the plain way: at each miss evict the key of least worth, computed from the whole past."""
    held: dict[str, int] = {}
    misses = 0
    for position, (key, size_bytes) in enumerate(trace):
        if key in held:
            continue
        misses += 1
        while sum(held.values()) + size_bytes > capacity_bytes:
            del held[min(held, key=lambda other: worth(other, position, trace))]
        held[key] = size_bytes
    return misses


def last_use(key: str, position: int, trace: Trace) -> tuple[int, ...]:
    """The worth of a key under LRU."""
    return (max(at for at in range(position) if trace[at][0] == key),)


def belady(key: str, position: int, trace: Trace) -> tuple[int, ...]:
    """The worth of a key to one who knows the future: the sooner its next use, the more."""
    return (-next((at for at in range(position, len(trace)) if trace[at][0] == key), len(trace)),)


def slow_lfu_misses(trace: Trace, capacity_bytes: int) -> int:
    """LFU with uses counted since a key came in, the least recently used among equals going first."""
    held: dict[str, list[int]] = {}
    misses = 0
    sizes = dict(trace)
    for position, (key, size_bytes) in enumerate(trace):
        if key in held:
            held[key].append(position)
            continue
        misses += 1
        while sum(sizes[other] for other in held) + size_bytes > capacity_bytes:
            del held[min(held, key=lambda other: (len(held[other]), held[other][-1]))]
        held[key] = [position]
    return misses


REFERENCES: dict[str, Callable[[Trace, int], int]] = {
    "lru": lambda trace, capacity: slow_misses(trace, capacity, last_use),
    "lfu": slow_lfu_misses,
}


@pytest.mark.parametrize("capacity_bytes", CAPACITIES)
@pytest.mark.parametrize("name", sorted(POLICIES["eviction"]))
def test_misses_are_as_checked_in(name: str, capacity_bytes: int) -> None:
    """Each registered policy has its checked-in count for each size of cache."""
    assert misses_of(resolve("eviction", name)(), golden_trace(), capacity_bytes) == COUNTS[name][str(capacity_bytes)]


@pytest.mark.parametrize("capacity_bytes", CAPACITIES)
@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_the_slow_reference_agrees(name: str, capacity_bytes: int) -> None:
    """An implementation written for plainness alone counts the same."""
    assert REFERENCES[name](golden_trace(), capacity_bytes) == COUNTS[name][str(capacity_bytes)]


def test_the_trace_is_as_checked_in() -> None:
    """The generator gives what it gave when the counts were taken."""
    trace = golden_trace()
    assert len(trace) == 2000
    assert trace[:4] == [tuple(pair) for pair in COUNTS["trace"]]  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("capacity_bytes", CAPACITIES)
def test_nobody_beats_the_future(capacity_bytes: int) -> None:
    """One who evicts what is used furthest in the future misses less than every policy, the sizes being near equal."""
    best = slow_misses(golden_trace(), capacity_bytes, belady)
    for name in POLICIES["eviction"]:
        assert best < COUNTS[name][str(capacity_bytes)]
