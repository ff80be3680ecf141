"""What is known of members and leases, and the bounds that all of them share."""

from __future__ import annotations

from dataclasses import dataclass

SECOND_NS = 1_000_000_000
LEADER = "#leader"
"""The lease of whoever does what one of them must do: a backend by a name that no backend can have."""


@dataclass(frozen=True, slots=True)
class Member:
    """One life of one process. `id` is never used again; `name` lives on, and two lives of one name never overlap."""

    id: str
    name: str
    weight: float = 1.0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as Redis had it when it answered; only of its present generation.

    `left_ns` is until its end, never positive once it has ended or was released; `unattended_ns` until it may be taken
    over where no witness answers.
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
    """Times in ns, equal on all members. ValueError if they contradict each other.

    `drift` is by how much, as a share, the rates of any two clocks may differ, Redis's among them. `margin_ns` is what
    remains for a clock that is set, and between the check and the write. `ask_ns` is how long answers of members are
    waited for. `attempt_ns` is how long after a look at Redis an acquisition that rests on it may be carried out: at
    most a lease, so that one granted in between is still there. `alone_ns` is how long an owner goes on without Redis
    at most, on the pledges of its witnesses, counted from what Redis granted last.
    """

    ttl_ns: int = 10 * SECOND_NS
    drift: float = 0.01
    margin_ns: int = 200_000_000
    ask_ns: int = 500_000_000
    attempt_ns: int = 2 * SECOND_NS
    alone_ns: int = 24 * 3600 * SECOND_NS

    @classmethod
    def of_lease(cls, ttl_ns: int) -> Bounds:
        """Return the bounds of a lease: the default ones, in proportion where the lease is shorter than that one."""
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
        """How long a taker waits that no witness answers: from the last renewal, or from the birth of a generation.

        A lease, in which owners claim and renew, and the time to ask twice.
        """
        return self.ttl_ns + 2 * self.ask_ns

    @property
    def every_ns(self) -> int:
        """Between two beats, and between two renewals."""
        return self.ttl_ns // 3

    @property
    def retry_ns(self) -> int:
        """Until what failed is tried again."""
        return self.ttl_ns // 10

    def usable_ns(self, span_ns: int) -> int:
        """Return how much of a span that another clock counts is there for certain by one's own."""
        return int(span_ns * (1 - self.drift)) - self.margin_ns

    def passed_ns(self, span_ns: int) -> int:
        """Return after how long by one's own clock a span that another clock counts has passed for certain."""
        return int(span_ns * (1 + self.drift)) + self.margin_ns
