"""How long needed adapters have been on their way into the host store. A promise allows for a limited time of it.

An adapter is on its way from the moment a request waits for it while neither the store nor its engine holds it. The
clock stops while the store has no space for the first needed blob, because that delay is the queue's own and not an
origin's, unless the space is taken by blobs that are being fetched. Once a fetch begins, its own clock never stops.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Missing:
    """One adapter on its way. `since` and `begun` are readings of the clock that stops, in ns."""

    since: int
    begun: int = 0
    begun_ns: int = 0


@dataclass(slots=True)
class Lateness:
    """The clock that stops, and the missing blobs by packed key."""

    missing: dict[str, Missing] = field(default_factory=dict)
    stood_ns: int = 0
    stands_since_ns: int = 0

    def clock(self, now_ns: int) -> int:
        """Return the reading in ns of the clock that stops."""
        stands_ns = now_ns - self.stands_since_ns if self.stands_since_ns else 0
        return now_ns - self.stood_ns - stands_ns

    def stop(self, now_ns: int) -> None:
        """Stop the clock: blobs in use leave no space for the first needed one."""
        self.stands_since_ns = self.stands_since_ns or now_ns

    def resume(self, now_ns: int) -> None:
        """Let the clock run: there is space, nothing is needed, or the space is taken by running fetches."""
        if self.stands_since_ns:
            self.stood_ns += now_ns - self.stands_since_ns
            self.stands_since_ns = 0

    def misses(self, key: str, now_ns: int) -> None:
        """Note that a request waits for a blob that is not here."""
        if key not in self.missing:
            self.missing[key] = Missing(self.clock(now_ns))

    def begins(self, key: str, now_ns: int) -> None:
        """Note that a fetch began."""
        missing = self.missing.get(key)
        if missing is not None and not missing.begun_ns:
            missing.begun, missing.begun_ns = self.clock(now_ns), now_ns

    def ends(self, key: str) -> None:
        """Note that a blob is here, or that no request waits for it any more."""
        self.missing.pop(key, None)

    def waited_ns(self, key: str, arrived_ns: int, arrived: int, now_ns: int) -> int:
        """Return how long in ns a request has waited for a blob; `arrived` is the clock's reading at `arrived_ns`."""
        missing = self.missing.get(key)
        if missing is None:
            return 0
        if not missing.begun_ns:
            return self.clock(now_ns) - max(missing.since, arrived)
        return max(0, missing.begun - max(missing.since, arrived)) + now_ns - max(missing.begun_ns, arrived_ns)
