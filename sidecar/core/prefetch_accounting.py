"""Accounting of prefetches: what was brought in before a request needed it, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field

SECOND_NS = 1_000_000_000
BURST_S = 10
"""The byte budget saves up this many seconds of its rate, which limits the largest speculative fetch."""

PAUSE_NS = 30 * SECOND_NS
"""How long prefetching stops after a failed try."""


@dataclass(slots=True)
class PrefetchCounts:
    """Counts of prefetches into one place: how many, and what became of them."""

    begun: int = 0
    used: int = 0
    late: int = 0
    """Used ones for which a request still had to wait."""
    wasted_bytes: int = 0
    """Bytes that were evicted or given up unused."""

    def add(self, other: PrefetchCounts) -> None:
        self.begun += other.begun
        self.used += other.used
        self.late += other.late
        self.wasted_bytes += other.wasted_bytes


@dataclass(slots=True)
class Guess:
    """A blob that is fetched, or was, before any request waited for it."""

    size_bytes: int
    given_up: bool = False
    """A request needs its space: it is dropped as soon as it arrives."""


@dataclass(slots=True)
class Guesses:
    """Speculative blobs that no request has used yet, by packed key, and the remaining byte budget."""

    unused: dict[str, Guess] = field(default_factory=dict)
    ask_after_ns: int = 0
    budget_bytes: int = 0
    budget_ns: int = 0
    """When the budget was last refilled."""
    counts: PrefetchCounts = field(default_factory=PrefetchCounts)

    def refill(self, bytes_per_s: int, now_ns: int) -> int:
        """Return the bytes that may be fetched speculatively now: a token bucket that starts full."""
        earned = bytes_per_s * (now_ns - self.budget_ns) // SECOND_NS if self.budget_ns else BURST_S * bytes_per_s
        if earned:
            self.budget_bytes = min(BURST_S * bytes_per_s, self.budget_bytes + earned)
            self.budget_ns = now_ns
        return self.budget_bytes

    def begun(self, key: str, size_bytes: int) -> None:
        self.unused[key] = Guess(size_bytes)
        self.budget_bytes -= size_bytes
        self.counts.begun += 1

    def arrived(self, key: str) -> None:
        """Note that a guess arrived, so that the next may be made."""
        if key in self.unused:
            self.ask_after_ns = 0

    def failed(self, key: str, now_ns: int) -> None:
        """Note that a guess could not be fetched. It used no budget, but other guesses pause for a while."""
        if self.unused.pop(key, None) is not None:
            self.ask_after_ns = now_ns + PAUSE_NS

    def used(self, key: str, late: bool) -> None:
        """Note that a request uses the blob: a good guess."""
        if self.unused.pop(key, None) is not None:
            self.counts.used += 1
            self.counts.late += late

    def gone(self, key: str) -> None:
        """Note that a blob left the store: a bad guess if it was unused."""
        guess = self.unused.pop(key, None)
        if guess is not None:
            self.counts.wasted_bytes += guess.size_bytes


@dataclass(slots=True)
class PrefetchedLoad:
    """A version loaded, or being loaded, before its requests were due; kept until one of them runs."""

    size_bytes: int
    done_ns: int | None = None


@dataclass(slots=True)
class PrefetchedLoads:
    """Versions loaded ahead into one backend's engine."""

    unused: dict[str, PrefetchedLoad] = field(default_factory=dict)
    rest: int = 0
    """Rounds to skip before the next try, after one that found nothing to load or no space."""
    paused_until_ns: int = 0
    """Set after a failed load: the engine has less space than believed, or other problems."""
    counts: PrefetchCounts = field(default_factory=PrefetchCounts)

    @property
    def under_way(self) -> bool:
        return any(one.done_ns is None for one in self.unused.values())

    def begun(self, version: str, size_bytes: int) -> None:
        self.unused[version] = PrefetchedLoad(size_bytes)
        self.counts.begun += 1

    def ended(self, version: str, loaded: bool, now_ns: int) -> None:
        """Note that a Load has ended."""
        self.unused[version].done_ns = now_ns
        if not loaded:
            self.gone(version)
            self.paused_until_ns = now_ns + PAUSE_NS

    def used(self, version: str, now_ns: int) -> None:
        """Note that a request of the version runs. It waited for the Load if it was sent the moment that ended."""
        self.counts.used += 1
        self.counts.late += self.unused.pop(version).done_ns == now_ns

    def gone(self, version: str) -> None:
        """Note that a version left the engine, or the queue, before any request used it."""
        self.counts.wasted_bytes += self.unused.pop(version).size_bytes

    def clear(self) -> None:
        """Note that the engine has restarted."""
        for version in list(self.unused):
            self.gone(version)
        self.paused_until_ns = 0
