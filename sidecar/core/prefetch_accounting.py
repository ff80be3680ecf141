"""What was brought in before anybody had to wait for it, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field

SECOND_NS = 1_000_000_000
BURST_S = 10
"""Seconds of its rate that the byte budget saves up, so the largest adapter that is ever fetched on speculation."""

PAUSE_NS = 30 * SECOND_NS
"""Nothing more is brought in for so long after a try that failed."""


@dataclass
class PrefetchCounts:
    """What came into one place ahead of its use: how often, and to what end."""

    begun: int = 0
    used: int = 0
    late: int = 0
    """Of those used: a request had to wait for the rest of the way."""
    wasted_bytes: int = 0
    """Bytes of what went, or was given up, before anybody used it."""

    def add(self, other: PrefetchCounts) -> None:
        self.begun += other.begun
        self.used += other.used
        self.late += other.late
        self.wasted_bytes += other.wasted_bytes


@dataclass
class Guess:
    """A blob that was fetched, or is being fetched, though nobody waited for it."""

    size_bytes: int
    given_up: bool = False
    """Somebody waits for what it takes: it is dropped as soon as it is here."""


@dataclass
class Guesses:
    """Blobs that came on speculation and that nobody has used yet, by packed key; and what may still be spent."""

    unused: dict[str, Guess] = field(default_factory=dict)
    ask_after_ns: int = 0
    budget_bytes: int = 0
    budget_ns: int = 0
    """When the budget was last brought up to date."""
    counts: PrefetchCounts = field(default_factory=PrefetchCounts)

    def refill(self, bytes_per_s: int, now_ns: int) -> int:
        """Return the bytes that may be fetched on speculation now: a token bucket, full at the start."""
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
        """Note that a guess is here, so that the next may be made."""
        if key in self.unused:
            self.ask_after_ns = 0

    def failed(self, key: str, now_ns: int) -> None:
        """Note that a guess cannot be had: it took nothing, but others are left alone for a while."""
        if self.unused.pop(key, None) is not None:
            self.ask_after_ns = now_ns + PAUSE_NS

    def used(self, key: str, late: bool) -> None:
        """Note that a request wants the blob: it was a good guess."""
        if self.unused.pop(key, None) is not None:
            self.counts.used += 1
            self.counts.late += late

    def gone(self, key: str) -> None:
        """Note that a blob left the store; if nobody had used it, it was a bad guess."""
        guess = self.unused.pop(key, None)
        if guess is not None:
            self.counts.wasted_bytes += guess.size_bytes


@dataclass
class PrefetchedLoad:
    """A version that is being loaded, or was, while others had its turn; until a request of it runs."""

    size_bytes: int
    done_ns: int | None = None


@dataclass
class PrefetchedLoads:
    """What one backend's engine was given ahead of time, by version."""

    unused: dict[str, PrefetchedLoad] = field(default_factory=dict)
    rest: int = 0
    """Rounds that are let pass before the next look: the last one found nothing to load, or no room for it."""
    paused_until_ns: int = 0
    """One failed: the engine has less room than is believed, or worse to do."""
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
        """Note that a request of the version runs; it waited for the Load if it was sent as soon as that ended."""
        self.counts.used += 1
        self.counts.late += self.unused.pop(version).done_ns == now_ns

    def gone(self, version: str) -> None:
        """Note that nobody used a version before it left the engine, or before nobody waited for it any more."""
        self.counts.wasted_bytes += self.unused.pop(version).size_bytes

    def clear(self) -> None:
        """Note that the engine has started anew."""
        for version in list(self.unused):
            self.gone(version)
        self.paused_until_ns = 0
