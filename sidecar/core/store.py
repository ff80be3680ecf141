"""The index of the host store: bytes, reservations and pins. The eviction policy only ranks the idle blobs.

Three rules keep a store that is much smaller than its queue from deadlock and thrashing. Bytes are reserved before a
fetch begins, so fetches in flight count. Only blobs being loaded or used are pinned; those of queued requests are
not. A waiting request may evict a blob that others wait for only if they all wait behind it, furthest first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from policies.views import Eviction


@dataclass(slots=True)
class Entry:
    """One blob, held or being fetched."""

    size_bytes: int
    digest: str
    ready: bool = False
    pins: int = 0
    held_by_operator: bool = False
    doomed: bool = False
    """Drop it as soon as its last pin is gone or its fetch ends."""


@dataclass(slots=True)
class StoreIndex:
    """What the store holds and fetches. `bytes_used` never exceeds `budget_bytes`."""

    budget_bytes: int
    policy: Eviction = field(metadata={"policy": True})
    entries: dict[str, Entry] = field(default_factory=dict)
    bytes_used: int = 0
    fetches: int = 0
    """How many entries are being fetched."""
    evictions: int = 0
    _by_digest: dict[str, list[str]] = field(default_factory=dict, metadata={"derived": True})

    def keys_of(self, digest: str) -> list[str]:
        """Return the keys of a version's blobs, one for each layout, those being fetched included."""
        if not self._by_digest:
            for key, entry in self.entries.items():
                self._by_digest.setdefault(entry.digest, []).append(key)
        return list(self._by_digest.get(digest, ()))

    def has(self, key: str) -> bool:
        entry = self.entries.get(key)
        return entry is not None and entry.ready and not entry.doomed

    def fetching(self, key: str) -> bool:
        entry = self.entries.get(key)
        return entry is not None and not entry.ready

    def victims_for(
        self, size_bytes: int, now_ns: int, next_position: Callable[[str], int | None], mine: int | None
    ) -> list[str] | None:
        """Return the keys to evict so that `size_bytes` fit ([] if they fit already); None if that cannot be done.

        `next_position(key)` is the queue position of the first request that waits for a blob, or None. `mine` is the
        position of the request that needs the space; None for a prefetch, which takes nothing that a request needs.
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
        """Reserve the bytes of a fetch that begins. They must fit: call `victims_for` first."""
        assert key not in self.entries, f"{key} is held or being fetched already"
        assert self.bytes_used + size_bytes <= self.budget_bytes, "a reservation over the budget"
        self.entries[key] = Entry(size_bytes, digest)
        if self._by_digest:
            self._by_digest.setdefault(digest, []).append(key)
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
        """Free the bytes of a blob or of a failed fetch."""
        entry = self.entries.pop(key)
        assert not entry.pins, f"{key} is pinned"
        if entry.digest in self._by_digest:
            self._by_digest[entry.digest].remove(key)
            if not self._by_digest[entry.digest]:
                del self._by_digest[entry.digest]
        self.bytes_used -= entry.size_bytes
        if entry.ready:
            self.policy.on_remove(key, 0)
        else:
            self.fetches -= 1

    def pin(self, key: str) -> bool:
        """Pin a blob against eviction and return True; return False if the blob is not here."""
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
