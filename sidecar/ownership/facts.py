"""Members, leases, and the time bounds that all members share."""

from __future__ import annotations

from dataclasses import dataclass

SECOND_NS = 1_000_000_000
LEADER = "#leader"
"""The lease for tasks of a single member: a backend with an id that no backend can have."""


@dataclass(frozen=True, slots=True)
class Member:
    """One life of one process. `id` is never used again; `name` stays, and two lives of one name never overlap."""

    id: str
    name: str
    weight: float = 1.0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as Redis reported it, of its present generation.

    `left_ns` is the time until its end, not positive once it has ended or was released; `unattended_ns` the time until
    it may be taken over if no witness answers.
    """

    backend: str
    holder: str
    holder_name: str
    epoch: int
    left_ns: int
    unattended_ns: int
    witnesses: tuple[str, ...]
    released: bool = False


@dataclass(frozen=True)
class Bounds:
    """Times in ns, equal on all members. Raises ValueError if they contradict each other.

    `drift` is the largest relative difference between the rates of any two clocks, Redis's included. `margin_ns` allows
    for clocks that are set, and for the time between check and write. `ask_ns` is how long members' answers are waited
    for. `attempt_ns` is how long after a look at Redis an acquisition based on it may be carried out: at most a lease,
    so that a lease granted in between still exists. `alone_ns` is how long an owner may continue without Redis on the
    pledges of its witnesses, counted from the last grant of Redis.
    """

    ttl_ns: int = 10 * SECOND_NS
    drift: float = 0.01
    margin_ns: int = 200_000_000
    ask_ns: int = 500_000_000
    attempt_ns: int = 2 * SECOND_NS
    alone_ns: int = 24 * 3600 * SECOND_NS

    @classmethod
    def of_lease(cls, ttl_ns: int) -> Bounds:
        """Return the bounds for a lease of `ttl_ns`: the default ones, scaled down for a shorter lease."""
        usual = cls()
        share = min(1.0, ttl_ns / usual.ttl_ns)
        return cls(
            ttl_ns,
            margin_ns=int(usual.margin_ns * share),
            ask_ns=int(usual.ask_ns * share),
            attempt_ns=int(usual.attempt_ns * share),
        )

    def __post_init__(self) -> None:
        if self.usable_ns(self.ttl_ns) <= self.every_ns + self.retry_ns:
            raise ValueError(f"ttl_ns {self.ttl_ns} leaves no time to renew: raise it or lower drift and margin_ns")
        if not self.ask_ns < self.attempt_ns <= self.ttl_ns <= self.alone_ns:
            raise ValueError(
                f"ask_ns {self.ask_ns} < attempt_ns {self.attempt_ns} <= ttl_ns {self.ttl_ns} <= alone_ns "
                f"{self.alone_ns} must hold"
            )

    @property
    def grace_ns(self) -> int:
        """How long a taker waits if no witness answers: from the last renewal, or from the start of a generation.

        It is a lease, in which owners claim and renew, plus the time to ask twice.
        """
        return self.ttl_ns + 2 * self.ask_ns

    @property
    def every_ns(self) -> int:
        """The time between two beats, and between two renewals."""
        return self.ttl_ns // 3

    @property
    def retry_ns(self) -> int:
        """The time after which a failed call is repeated."""
        return self.ttl_ns // 10

    def usable_ns(self, span_ns: int) -> int:
        """Return how much of a span on another clock certainly remains on one's own."""
        return int(span_ns * (1 - self.drift)) - self.margin_ns

    def passed_ns(self, span_ns: int) -> int:
        """Return after how much time on one's own clock a span on another clock has certainly passed."""
        return int(span_ns * (1 + self.drift)) + self.margin_ns
