"""How long adapters that are needed have been on their way into the host store: what promises allow only so much of.

The way begins when a request waits for an adapter that neither the store nor its engine has. While the store has no
room for what is needed first, the clock stands still: that is the queue's own doing and not an origin's, unless others
are on their way into that room. From the beginning of its fetch on, an adapter's own clock always runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Missing:
    """One adapter on its way. `since` and `begun` are by the clock that stops."""

    since: int
    begun: int = 0
    begun_ns: int = 0


@dataclass
class Lateness:
    """The clock, and what is on its way by packed key."""

    missing: dict[str, Missing] = field(default_factory=dict)
    stood_ns: int = 0
    stands_since_ns: int = 0

    def clock(self, now_ns: int) -> int:
        stands_ns = now_ns - self.stands_since_ns if self.stands_since_ns else 0
        return now_ns - self.stood_ns - stands_ns

    def stand(self, now_ns: int) -> None:
        """What is in use leaves no room for what is needed first."""
        self.stands_since_ns = self.stands_since_ns or now_ns

    def go(self, now_ns: int) -> None:
        """There is room, nothing is needed, or what takes the room is on its way itself."""
        if self.stands_since_ns:
            self.stood_ns += now_ns - self.stands_since_ns
            self.stands_since_ns = 0

    def misses(self, key: str, now_ns: int) -> None:
        """Somebody waits for a blob that is not here."""
        if key not in self.missing:
            self.missing[key] = Missing(self.clock(now_ns))

    def begins(self, key: str, now_ns: int) -> None:
        """A blob is being fetched."""
        missing = self.missing.get(key)
        if missing is not None and not missing.begun_ns:
            missing.begun, missing.begun_ns = self.clock(now_ns), now_ns

    def ends(self, key: str) -> None:
        """A blob is here, or nobody waits for it any more."""
        self.missing.pop(key, None)

    def waited_ns(self, key: str, arrived_ns: int, arrived: int, now_ns: int) -> int:
        """Return for how long one who came at `arrived_ns`, `arrived` by the clock, has waited for a blob."""
        missing = self.missing.get(key)
        if missing is None:
            return 0
        if not missing.begun_ns:
            return self.clock(now_ns) - max(missing.since, arrived)
        return max(0, missing.begun - max(missing.since, arrived)) + now_ns - max(missing.begun_ns, arrived_ns)
