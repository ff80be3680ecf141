"""What has happened, in the past tense. Each Send effect but the releases is answered, or said to have failed.

`number` is that of the effect that is answered. An answer that comes late, twice or after a failure does no harm.
Times of Redis are in ns by its own clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.ownership.enums import Purpose
from sidecar.ownership.facts import Lease, Member


@dataclass(frozen=True, slots=True)
class BeatAnswered:
    """Redis as it is: who lives, and the leases of its generation.

    `newborn_ns` is until a backend without a lease may be acquired; not positive once that is so.
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

    If refused, `holder` is who holds it, ended or not; "" if this generation knows of no holder.
    """

    number: int
    granted: bool
    epoch: int
    holder: str
    generation: str
    redis_ns: int


@dataclass(frozen=True, slots=True)
class LeaseFailed:
    """Whether the script ran is not known."""

    number: int


@dataclass(frozen=True, slots=True)
class AskAnswered:
    """What a member says: `agreed` is a pledge, or that none is outstanding, or that a move has begun.

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
    """Nothing is in flight any more at a backend that was disowned to be moved."""

    backend: str


@dataclass(frozen=True, slots=True)
class BackendFound:
    """There is a backend more. Other members may know it already, or not yet. `home` is as for `Ownership`."""

    backend: str
    home: str = ""


@dataclass(frozen=True, slots=True)
class BackendGone:
    """There is a backend less, as far as this member knows."""

    backend: str


@dataclass(frozen=True, slots=True)
class DrainBegun:
    """Give up everything, one after another, and leave."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed a point that a `WakeAt` effect asked for; also the first event of a life."""


Event = (
    BeatAnswered | BeatFailed | LeaseAnswered | LeaseFailed | AskAnswered | AskReceived | InFlightEnded | BackendFound
    | BackendGone | DrainBegun | Tick
)  # fmt: skip
