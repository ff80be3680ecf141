"""The eviction policies once more, from their papers, for plainness alone: lists, no index, every decision a full scan.

Each function returns the positions of a trace's misses in a cache of so many bytes. A trace is (key, size) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from policies.eviction.cost import refetch_ns

Trace = list[tuple[str, int]]


def lru(trace: Trace, capacity_bytes: int) -> list[int]:
    """Evict the key whose last use is longest ago."""
    return by_worth(
        trace, capacity_bytes, lambda key, at: (next(p for p in reversed(range(at)) if trace[p][0] == key),)
    )


def belady_by_size(trace: Trace, capacity_bytes: int) -> list[int]:
    """Know the future: evict the key whose next use times its size is most. A good aim, not a bound."""
    sizes = dict(trace)

    def worth(key: str, at: int) -> tuple[int, ...]:
        following = next((p for p in range(at, len(trace)) if trace[p][0] == key), 2 * len(trace))
        return (-(following - at) * sizes[key],)

    return by_worth(trace, capacity_bytes, worth)


def by_worth(trace: Trace, capacity_bytes: int, worth: Callable[[str, int], tuple[int, ...]]) -> list[int]:
    """At each miss evict the key of least worth, computed from the whole trace."""
    held: dict[str, int] = {}
    misses = []
    for at, (key, size_bytes) in enumerate(trace):
        if key in held:
            continue
        misses.append(at)
        while sum(held.values()) + size_bytes > capacity_bytes:
            del held[min(held, key=lambda other: worth(other, at))]
        held[key] = size_bytes
    return misses


def lfu(trace: Trace, capacity_bytes: int) -> list[int]:
    """LFU-DA (Arlitt et al. 2000): K = F + L."""
    return greedy_dual(trace, capacity_bytes, lambda size_bytes: 1)


def gdsf(trace: Trace, capacity_bytes: int) -> list[int]:
    """GDSF (Cherkasova 1998): H = L + F * C / S."""
    return greedy_dual(trace, capacity_bytes, lambda size_bytes: refetch_ns(size_bytes) / size_bytes)


def greedy_dual(trace: Trace, capacity_bytes: int, worth: Callable[[int], float]) -> list[int]:
    """Evict the least priority, which becomes L; among equals the one used longest ago."""
    sizes = dict(trace)
    inflation: float = 0
    uses: dict[str, int] = {}
    priority: dict[str, tuple[float, int]] = {}
    misses = []
    for at, (key, size_bytes) in enumerate(trace):
        if key not in uses:
            misses.append(at)
            while sum(sizes[other] for other in uses) + size_bytes > capacity_bytes:
                victim = min(priority, key=lambda other: priority[other])
                inflation = priority.pop(victim)[0]
                del uses[victim]
        uses[key] = uses.get(key, 0) + 1
        priority[key] = (inflation + uses[key] * worth(size_bytes), at)
    return misses


def sieve(trace: Trace, capacity_bytes: int) -> list[int]:
    """SIEVE (Zhang et al. 2024), the paper's algorithm 1. `queue[0]` is the tail, `hand` a key or None."""
    sizes = dict(trace)
    queue: list[str] = []
    visited: dict[str, bool] = {}
    hand: str | None = None

    def towards_head(key: str) -> str | None:
        place = queue.index(key) + 1
        return queue[place] if place < len(queue) else None

    misses = []
    for at, (key, size_bytes) in enumerate(trace):
        if key in visited:
            visited[key] = True
            continue
        misses.append(at)
        while sum(sizes[other] for other in queue) + size_bytes > capacity_bytes:
            candidate = hand or queue[0]
            while visited[candidate]:
                visited[candidate] = False
                candidate = towards_head(candidate) or queue[0]
            hand = towards_head(candidate)
            queue.remove(candidate)
            del visited[candidate]
        queue.append(key)
        visited[key] = False
    return misses


def s3fifo(trace: Trace, capacity_bytes: int) -> list[int]:
    """S3-FIFO (Yang et al. 2023), the paper's algorithm 1 with sizes in bytes."""
    queues = _ThreeQueues(dict(trace))
    return [at for at, (key, _) in enumerate(trace) if queues.read(key, capacity_bytes)]


@dataclass
class _ThreeQueues:
    """S, M and G from tail to head. The cache's size is the most that it has held."""

    sizes: dict[str, int]
    small: list[str] = field(default_factory=list)
    main: list[str] = field(default_factory=list)
    ghost: list[str] = field(default_factory=list)
    frequency: dict[str, int] = field(default_factory=dict)
    most_bytes: int = 0

    def bytes_of(self, queue: list[str]) -> int:
        return sum(self.sizes[key] for key in queue)

    def read(self, key: str, capacity_bytes: int) -> bool:
        """Use a key; return whether it was missing."""
        if key in self.small or key in self.main:
            self.frequency[key] = min(self.frequency[key] + 1, 3)
            return False
        while self.bytes_of(self.small + self.main) + self.sizes[key] > capacity_bytes:
            self.evict()
        if key in self.ghost:
            self.ghost.remove(key)
            self.main.append(key)
        else:
            self.small.append(key)
        self.frequency[key] = 0
        self.most_bytes = max(self.most_bytes, self.bytes_of(self.small + self.main))
        return True

    def evict(self) -> None:
        if self.small and (self.bytes_of(self.small) >= self.most_bytes / 10 or not self.main):
            self.evict_small()
        else:
            self.evict_main()

    def evict_small(self) -> None:
        while self.small:
            tail = self.small.pop(0)
            if self.frequency[tail] > 1:
                self.frequency[tail] = 0
                self.main.append(tail)
                continue
            self.ghost.append(tail)
            while self.bytes_of(self.ghost) > 0.9 * self.most_bytes:
                self.ghost.pop(0)
            return

    def evict_main(self) -> None:
        while self.main:
            tail = self.main.pop(0)
            if not self.frequency[tail]:
                return
            self.frequency[tail] -= 1
            self.main.append(tail)


def rate_per_byte(trace: Trace, capacity_bytes: int) -> list[int]:
    """Follow the expert whose own cache has cost least of late; each judges by the plain history of uses."""
    cache = _Experts(dict(trace))
    return [at for at, (key, _) in enumerate(trace) if cache.read(key, capacity_bytes)]


@dataclass
class _Experts:
    """The real cache and one for each expert. Request numbers begin at 1; on short traces nothing is forgotten."""

    sizes: dict[str, int]
    now: int = 0
    uses: dict[str, list[int]] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)
    most_bytes: int = 0
    in_charge: str = "recency"
    shadows: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in HAZARDS})
    bills: dict[str, float] = field(default_factory=lambda: dict.fromkeys(HAZARDS, 0.0))

    def read(self, key: str, capacity_bytes: int) -> bool:
        """Use a key; return whether it was missing."""
        is_missing = key not in self.held
        if is_missing:
            self.make_room(self.held, self.in_charge, capacity_bytes - self.sizes[key])
            self.held.append(key)
            self.most_bytes = max(self.most_bytes, sum(self.sizes[other] for other in self.held))
        self.now += 1
        self.uses.setdefault(key, []).append(self.now)
        for name, shadow in self.shadows.items():
            self.bills[name] *= 0.5 ** (1 / 5000)
            if key not in shadow:
                self.bills[name] += refetch_ns(self.sizes[key])
                self.make_room(shadow, name, self.most_bytes - self.sizes[key])
                shadow.append(key)
        best = min(self.bills, key=lambda name: self.bills[name])
        if self.bills[self.in_charge] > 1.03 * self.bills[best]:
            self.in_charge = best
        return is_missing

    def make_room(self, cache: list[str], expert: str, capacity_bytes: int) -> None:
        while sum(self.sizes[key] for key in cache) > capacity_bytes:
            cache.remove(min(cache, key=lambda key: self.worth(key, expert)))

    def worth(self, key: str, expert: str) -> tuple[float, int]:
        size_bytes = self.sizes[key]
        if expert == "recency":  # which knows sizes to five bits
            size_bytes -= size_bytes % 2 ** max(0, size_bytes.bit_length() - 5)
        per_byte = refetch_ns(size_bytes) / size_bytes
        return per_byte * HAZARDS[expert](self.uses[key], self.now), self.uses[key][-1]


def _decayed(half_life: int) -> Callable[[list[int], int], float]:
    return lambda uses, now: sum(0.5 ** ((now - use) / half_life) for use in uses)


HAZARDS: dict[str, Callable[[list[int], int], float]] = {
    "recency": lambda uses, now: 1 / (now - uses[-1] + 1),
    "rate_500": _decayed(500),
    "rate_5000": _decayed(5000),
}

REFERENCES: dict[str, Callable[[Trace, int], list[int]]] = {
    "lru": lru,
    "lfu": lfu,
    "gdsf": gdsf,
    "s3fifo": s3fifo,
    "sieve": sieve,
    "rate_per_byte": rate_per_byte,
}
