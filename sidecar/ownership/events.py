"""Events: what has happened, in the past tense. Each Send effect except SendRelease and SendLeave gets an answer.

`number` is that of the effect that is answered. Late and repeated answers, also after a failure, are harmless. Times of
Redis are in ns of its own clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.ownership.enums import Purpose
from sidecar.ownership.facts import Lease, Member


@dataclass(frozen=True, slots=True)
class BeatAnswered:
    """The state of Redis: live members, and the leases of its generation.

    `newborn_ns` is the time until a backend without a lease may be acquired; not positive once it may.
    """

    number: int
    generation: str
    redis_ns: int
    newborn_ns: int
    members: tuple[Member, ...]
    leases: tuple[Lease, ...]


@dataclass(frozen=True, slots=True)
class BeatFailed:
    number: int


@dataclass(frozen=True, slots=True)
class LeaseAnswered:
    """The answer to SendAcquire or SendRenew.

    After a refusal, `holder` is the member that holds the lease, ended or not; "" if this generation knows of none.
    """

    number: int
    granted: bool
    epoch: int
    holder: str
    generation: str
    redis_ns: int


@dataclass(frozen=True, slots=True)
class LeaseFailed:
    """The call failed; whether Redis ran the script is unknown."""

    number: int


@dataclass(frozen=True, slots=True)
class AskAnswered:
    """The answer of a member: `agreed` means a pledge, that no other pledge is outstanding, or that a move has begun.

    `epoch` is the newest that it has seen of the backend.
    """

    number: int
    member: str
    agreed: bool
    holds: bool
    reaches_redis: bool
    epoch: int


@dataclass(frozen=True, slots=True)
class AskReceived:
    """Another member asks; answered at once by an Answer effect with the same number and member."""

    number: int
    member: str
    backend: str
    purpose: Purpose
    epoch: int


@dataclass(frozen=True, slots=True)
class InFlightEnded:
    """Nothing is in flight any more at a backend that was disowned in order to be moved."""

    backend: str


@dataclass(frozen=True, slots=True)
class BackendFound:
    """A backend was discovered, maybe not yet by other members. `home` is as for `Ownership`."""

    backend: str
    home: str = ""


@dataclass(frozen=True, slots=True)
class BackendGone:
    """A backend is gone as far as this member knows."""

    backend: str


@dataclass(frozen=True, slots=True)
class DrainBegun:
    """Give up all backends one after another, and leave."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The time of a `WakeAt` effect has passed; also the first event of a member."""


Event = (
    BeatAnswered | BeatFailed | LeaseAnswered | LeaseFailed | AskAnswered | AskReceived | InFlightEnded | BackendFound
    | BackendGone | DrainBegun | Tick
)  # fmt: skip
