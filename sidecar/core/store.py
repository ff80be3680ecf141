"""The host store's index: bytes, reservations and pins. The mechanism; which idle blob goes first is the policy's.

Three rules keep a store that is much smaller than its queue from deadlocking or thrashing. Bytes are reserved before
a fetch begins, so what is in flight counts. Only blobs being loaded or in use are pinned; queued ones are not. And
for a waiting request a blob that others wait for is taken only from those who wait behind it, furthest first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from policies.views import Eviction


@dataclass
class Entry:
    """One blob: being fetched, or here."""

    size_bytes: int
    digest: str
    ready: bool = False
    pins: int = 0
    held_by_operator: bool = False
    doomed: bool = False
    """Dropped as soon as its last pin goes, or its fetch ends."""


@dataclass
class StoreIndex:
    """What the store holds and is fetching. `bytes_used` never exceeds `budget_bytes`."""

    budget_bytes: int
    policy: Eviction = field(metadata={"policy": True})
    entries: dict[str, Entry] = field(default_factory=dict)
    bytes_used: int = 0
    fetches: int = 0
    """How many entries are on their way here."""
    evictions: int = 0

    def has(self, key: str) -> bool:
        entry = self.entries.get(key)
        return entry is not None and entry.ready and not entry.doomed

    def fetching(self, key: str) -> bool:
        entry = self.entries.get(key)
        return entry is not None and not entry.ready

    def victims_for(
        self, size_bytes: int, now_ns: int, next_position: Callable[[str], int | None], mine: int | None
    ) -> list[str] | None:
        """Return what must go so that `size_bytes` fit, [] if nothing must; None if it cannot be made to fit.

        `next_position(key)` is the queue position of the first request that waits for a blob, None if none does;
        `mine` is the asker's own, None for a prefetch, which takes nothing from anyone who waits.
        """
        excess = self.bytes_used + size_bytes - self.budget_bytes
        if excess <= 0:
            return []
        victims: list[str] = []
        awaited: list[tuple[int, str]] = []
        for key in self.policy.victims(now_ns):
            if not self._evictable(key):
                continue
            position = next_position(key)
            if position is not None:
                awaited.append((position, key))
                continue
            victims.append(key)
            excess -= self.entries[key].size_bytes
            if excess <= 0:
                return victims
        for position, key in sorted(awaited, reverse=True):
            if mine is None or position < mine:
                return None
            victims.append(key)
            excess -= self.entries[key].size_bytes
            if excess <= 0:
                return victims
        return None

    def reserve(self, key: str, digest: str, size_bytes: int) -> None:
        """Count the bytes of a fetch that begins. They must fit: ask `victims_for` first."""
        assert key not in self.entries, f"{key} is held or being fetched already"
        assert self.bytes_used + size_bytes <= self.budget_bytes, "a reservation over the budget"
        self.entries[key] = Entry(size_bytes, digest)
        self.bytes_used += size_bytes
        self.fetches += 1

    def arrived(self, key: str, now_ns: int) -> None:
        entry = self.entries[key]
        entry.ready = True
        self.fetches -= 1
        self.policy.on_insert(key, entry.size_bytes, now_ns)

    def used(self, key: str, now_ns: int) -> None:
        if self.has(key):
            self.policy.on_hit(key, now_ns)

    def remove(self, key: str) -> None:
        """Give a blob's bytes back, or those of a fetch that failed."""
        entry = self.entries.pop(key)
        assert not entry.pins, f"{key} is pinned"
        self.bytes_used -= entry.size_bytes
        if entry.ready:
            self.policy.on_remove(key, 0)
        else:
            self.fetches -= 1

    def pin(self, key: str) -> bool:
        """Count a use that forbids eviction. False, and nothing counted, when the blob is not here."""
        if not self.has(key):
            return False
        self.entries[key].pins += 1
        return True

    def unpin(self, key: str) -> None:
        entry = self.entries[key]
        assert entry.pins > 0, f"{key} was not pinned"
        entry.pins -= 1

    def _evictable(self, key: str) -> bool:
        entry = self.entries[key]
        return entry.ready and not entry.pins and not entry.held_by_operator
