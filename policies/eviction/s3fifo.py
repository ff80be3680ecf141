"""S3-FIFO: new keys enter a small queue and must be used to get into the main queue; a ghost queue remembers evictions.

Source: Yang, Zhang, Qiu, Yue and Rashmi, "FIFO Queues are All You Need for Cache Eviction", SOSP 2023. New keys enter
the small queue, or the main one if the ghost queue remembers them. A use adds one to a counter, up to three. While the
small queue takes a tenth of the cache or more, it gives up its tail: into the main queue if it was used more than once,
its counter cleared, else out, and the ghost queue keeps its name. Otherwise the main queue's tail is evicted, or
returns to its head with one use less if it has any. Queues are measured in bytes, and the ghost queue remembers nine
tenths of the cache's bytes, as in the authors' simulator. Three things differ from the paper:
* The size of the cache is the most bytes ever tracked: a policy does not know the budget.
* A new key is never refused for its size: a requested adapter must be loaded.
* If another key than the first victim is removed, because the store had pinned that one, the queue of the removed key
  is swept once from its tail up to it: used keys move on, unused ones stay where they are.

A policy does not know whether a key is evicted or deleted: whatever leaves the small queue enters the ghost queue. A
key that was deleted and comes back was wanted again within a short time, which is what the ghost queue detects.

O(1) per event, amortised: a victim costs one step for each use spent on the way to it, and each use is spent once. A
single call may be long: at 100,000 adapters all used three times, finding the first victim takes some 60 ms and taking
it as much again, once; the next are found in 10 µs. The paper's order of a queue with counters cannot be kept in a
heap, as SIEVE's can.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

USES_MAX = 3
USES_TO_STAY = 2
SMALL_SHARE = 10
"""The small queue's target is one part in this many; the ghost queue's is the rest."""


@dataclass(slots=True)
class Held:
    """A key in the small or the main queue."""

    size_bytes: int
    uses: int = 0


@dataclass(slots=True)
class Sweep:
    """What the queues do on the way to the next victim, in order."""

    promoted: list[str] = field(default_factory=list)
    reinserted: list[str] = field(default_factory=list)


class S3FIFO:
    """The queues; each runs from tail to head."""

    def __init__(self) -> None:
        self._small: OrderedDict[str, Held] = OrderedDict()
        self._main: OrderedDict[str, Held] = OrderedDict()
        self._ghost: OrderedDict[str, int] = OrderedDict()
        self._small_bytes = 0
        self._main_bytes = 0
        self._ghost_bytes = 0
        self._bytes_max = 0

    def on_insert(self, key: str, size_bytes: int, now_ns: int) -> None:
        if key in self._ghost:
            self._ghost_bytes -= self._ghost.pop(key)
            self._main[key] = Held(size_bytes)
            self._main_bytes += size_bytes
        else:
            self._small[key] = Held(size_bytes)
            self._small_bytes += size_bytes
        self._bytes_max = max(self._bytes_max, self._small_bytes + self._main_bytes)

    def on_hit(self, key: str, now_ns: int) -> None:
        held = self._small.get(key) or self._main[key]
        held.uses = min(held.uses + 1, USES_MAX)

    def on_remove(self, key: str, now_ns: int) -> None:
        first, sweep = next(self._walk())
        if key != first:
            sweep = self._sweep_up_to(key)
        for promoted in sweep.promoted:
            self._promote(promoted)
        for reinserted in sweep.reinserted:
            self._main[reinserted].uses -= 1
            self._main.move_to_end(reinserted)
        self._drop(key)

    def victims(self, now_ns: int) -> Iterator[str]:
        for key, _ in self._walk():
            yield key

    def snapshot(self) -> dict[str, Any]:
        return {
            "small": [[key, held.size_bytes, held.uses] for key, held in self._small.items()],
            "main": [[key, held.size_bytes, held.uses] for key, held in self._main.items()],
            "ghost": [[key, size_bytes] for key, size_bytes in self._ghost.items()],
            "bytes_max": self._bytes_max,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._small = OrderedDict((key, Held(size_bytes, uses)) for key, size_bytes, uses in state["small"])
        self._main = OrderedDict((key, Held(size_bytes, uses)) for key, size_bytes, uses in state["main"])
        self._ghost = OrderedDict((key, size_bytes) for key, size_bytes in state["ghost"])
        self._small_bytes = sum(held.size_bytes for held in self._small.values())
        self._main_bytes = sum(held.size_bytes for held in self._main.values())
        self._ghost_bytes = sum(self._ghost.values())
        self._bytes_max = state["bytes_max"]

    def _walk(self) -> Iterator[tuple[str, Sweep]]:
        """Yield the keys in eviction order, each with the sweep since the one before; change nothing."""
        small, main = iter(self._small.items()), _Main(self._main)
        small_left, small_bytes, sweep = len(self._small), self._small_bytes, Sweep()
        while small_left or main.left:
            if main.left and (not small_left or small_bytes * SMALL_SHARE < self._bytes_max):
                yield main.victim(sweep), sweep
                sweep = Sweep()
                continue
            for key, held in small:
                small_left -= 1
                small_bytes -= held.size_bytes
                if held.uses < USES_TO_STAY:
                    yield key, sweep
                    sweep = Sweep()
                    break
                sweep.promoted.append(key)
                main.enter(key)

    def _sweep_up_to(self, key: str) -> Sweep:
        """Return what happens to the keys nearer to the tail of the key's queue."""
        queue = self._small if key in self._small else self._main
        passed = list(takewhile(lambda other: other != key, queue))
        if key in self._small:
            return Sweep(promoted=[other for other in passed if queue[other].uses >= USES_TO_STAY])
        return Sweep(reinserted=[other for other in passed if queue[other].uses])

    def _promote(self, key: str) -> None:
        size_bytes = self._small.pop(key).size_bytes
        self._small_bytes -= size_bytes
        self._main[key] = Held(size_bytes)
        self._main_bytes += size_bytes

    def _drop(self, key: str) -> None:
        if key in self._main:
            self._main_bytes -= self._main.pop(key).size_bytes
            return
        size_bytes = self._small.pop(key).size_bytes
        self._small_bytes -= size_bytes
        self._ghost[key] = size_bytes
        self._ghost_bytes += size_bytes
        while self._ghost_bytes * SMALL_SHARE > self._bytes_max * (SMALL_SHARE - 1):
            self._ghost_bytes -= self._ghost.popitem(last=False)[1]


class _Main:
    """The future of the main queue, read from its tail without changing it."""

    def __init__(self, queue: OrderedDict[str, Held]) -> None:
        self.left = len(queue)
        self._queue = iter(queue.items())
        self._returned: deque[tuple[str, int]] = deque()

    def enter(self, key: str) -> None:
        """Take in a key from the small queue."""
        self.left += 1
        self._returned.append((key, 0))

    def victim(self, sweep: Sweep) -> str:
        """Return the next victim and note the keys reinserted before it. The queue must not be empty."""
        while True:
            key, uses = self._tail()
            if not uses:
                self.left -= 1
                return key
            sweep.reinserted.append(key)
            self._returned.append((key, uses - 1))

    def _tail(self) -> tuple[str, int]:
        for key, held in self._queue:
            return key, held.uses
        return self._returned.popleft()
