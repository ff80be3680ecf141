"""Effects: what the shell must do, in the imperative."""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.ownership.enums import Purpose, Why
from sidecar.ownership.facts import Member


@dataclass(frozen=True, slots=True)
class SendBeat:
    """Tell Redis that this member lives; answered by BeatAnswered or BeatFailed."""

    number: int
    member: Member


@dataclass(frozen=True, slots=True)
class SendLeave:
    """Tell Redis that this member has left and given back all its leases. It is the last effect of a member."""

    member: str


@dataclass(frozen=True, slots=True)
class SendAcquire:
    """Ask Redis for a lease; answered by LeaseAnswered or LeaseFailed.

    `agreed` are the members that have pledged the backend to no other, this one included. `holds` means that this
    member owns it and Redis has forgotten that. Redis grants it only in `generation` and until `by_ns` of its own
    clock.
    """

    number: int
    backend: str
    token: str
    least_epoch: int
    witnesses: tuple[str, ...]
    agreed: tuple[str, ...]
    holds: bool
    generation: str
    by_ns: int


@dataclass(frozen=True, slots=True)
class SendRenew:
    """Ask Redis to prolong a lease; answered by LeaseAnswered or LeaseFailed. Redis ignores numbers that go back."""

    number: int
    backend: str
    token: str
    witnesses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SendRelease:
    """Give a lease back. If this is lost, the lease ends by itself."""

    backend: str
    token: str


@dataclass(frozen=True, slots=True)
class SendAsk:
    """Ask another member; answered by AskAnswered or not at all."""

    number: int
    to: str
    backend: str
    purpose: Purpose
    epoch: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to an AskReceived."""

    number: int
    to: str
    agreed: bool
    holds: bool
    reaches_redis: bool
    epoch: int


@dataclass(frozen=True, slots=True)
class Own:
    """This member owns a backend from now on, or still does under a newer epoch."""

    backend: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Disown:
    """Stop dispatching to a backend. For MOVED and DRAINING, InFlightEnded must follow."""

    backend: str
    why: Why


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Send a Tick at or after this time; replaces any earlier WakeAt."""

    at_ns: int


Effect = (
    SendBeat | SendLeave | SendAcquire | SendRenew | SendRelease | SendAsk | Answer | Own | Disown | WakeAt
)  # fmt: skip
