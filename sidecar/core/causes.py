"""Why a request ended without its whole answer, as values; `telling.endings` has the words.

A cause stands in a Settle beside its `Reason`, which is what programs read. It goes into journals and to other replicas
by its class's name, so renaming one changes both formats.
"""

from __future__ import annotations

import msgspec

from sidecar.core.facts import Suspicion
from sidecar.core.misfits import Misfit
from sidecar.errors import Reason
from sidecar.model.quote import EngineId, Quote


class _Cause(msgspec.Struct, frozen=True, tag=True, tag_field="!"):
    """What ended a request."""


class Said(_Cause, frozen=True):
    """The message of an error that was raised outside the core, by fronts, access or replicas."""

    text: Quote


# Not admitted.


class NoAdapterNamed(_Cause, frozen=True):
    """The request is for the base model, which is not served."""


class UnknownAdapter(_Cause, frozen=True):
    """`near` are similar known names; `none` means that the tenant may use no adapter. Operators have no tenant."""

    asked: str
    near: tuple[str, ...]
    none: bool
    tenant: str | None


class UnknownVersion(_Cause, frozen=True):
    """`known` are the ordinals and digests that the tenant may use."""

    adapter: str
    asked: str
    known: tuple[tuple[int, str], ...]


class NotAllowed(_Cause, frozen=True):
    """The allow list refuses the tenant, or with `by_policy` the list or the policy."""

    tenant: str
    adapter: str
    by_policy: bool


class ShuttingDown(_Cause, frozen=True):
    """The process ends, and takes nothing new."""


class Quarantined(_Cause, frozen=True):
    """The version is refused until an operator releases it."""

    suspicion: Suspicion


class UnknownClass(_Cause, frozen=True):
    """The configuration has other classes."""

    asked: str
    known: tuple[str, ...]


class DeadlineBefore(_Cause, frozen=True):
    """Its deadline had passed when it arrived."""


class QueueFull(_Cause, frozen=True):
    """So many `held` of `what` ("requests", "tokens" or "bytes") wait, in all or of a tenant."""

    what: str
    held: int
    limit: int
    tenant: str | None


class WaitTooLong(_Cause, frozen=True):
    """The bound of its wait is above what its class allows."""

    backend: EngineId
    wait_ns: int
    klass: str
    limit_ns: int


class DeadlineTooSoon(_Cause, frozen=True):
    """Its answer might not begin before its deadline, which is in `left_ns`."""

    backend: EngineId
    first_token_ns: int
    left_ns: int


class PromptTooLong(_Cause, frozen=True):
    """No engine that serves the adapter takes so many tokens."""

    tokens: int
    longest: int


class TooManySequences(_Cause, frozen=True):
    """No engine that serves the adapter has so many seats."""

    sequences: int
    seats: int


class NoBackend(_Cause, frozen=True):
    """No backend can serve the adapter: why not, by backend; `pools` are those in which none has been found."""

    backends: int
    unfit: tuple[tuple[EngineId, Misfit], ...]
    pools: tuple[EngineId, ...]


# Another replica's.


class Gone(_Cause, frozen=True):
    """None of the backends that it may go to is known here."""

    only: tuple[EngineId, ...]


class NotOwned(_Cause, frozen=True):
    """Other replicas own the backends that it may go to."""

    backends: tuple[EngineId, ...]


class OwnerChanged(_Cause, frozen=True):
    """Another replica has taken the backend over; `why` is a label of `ownership.enums.Why`."""

    backend: EngineId
    why: str


class Moved(_Cause, frozen=True):
    """Another replica sees to it."""


class LeaseEnded(_Cause, frozen=True):
    """It was not sent: this replica's lease on the engine had ended."""

    backend: EngineId


class NoOwner(_Cause, frozen=True):
    """No replica owns the backend at the moment."""


class NoMember(_Cause, frozen=True):
    """The replica that had it is no member any more."""

    replica: str


class BackendDown(_Cause, frozen=True):
    """Its backend at another replica is down."""

    backend: EngineId


class ReplicaAway(_Cause, frozen=True):
    """The connection to the replica that had it broke before its answer began."""

    replica: str
    text: Quote


class Unowned(_Cause, frozen=True):
    """No owner took it in time; `last` is why the last one gave it back."""

    backend: EngineId
    last: Cause


class ReplicaLost(_Cause, frozen=True):
    """The replica that answered it was lost in the middle of the answer."""

    replica: str
    backend: EngineId
    text: Quote


class BrokeOff(_Cause, frozen=True):
    """The answer, which went past the sidecar, broke off on its way to the client."""

    backend: EngineId
    text: Quote


# This process, or another replica, failed.


class Broken(_Cause, frozen=True):
    """The sidecar raised an error on this request alone."""

    text: Quote


class SidecarFailed(_Cause, frozen=True):
    """The process ends by an error that this request raised; `error` is the error's class."""

    client_id: str
    error: str


class Crashed(_Cause, frozen=True):
    """The process ends by an error of something else; `answering` if the answer had begun."""

    answering: bool


class Poisonous(_Cause, frozen=True):
    """It was at each of these replicas when they crashed."""

    client_id: str
    replicas: tuple[str, ...]


# Ended while it waited.


class DeadlinePassed(_Cause, frozen=True):
    """Its own deadline, so long after its arrival, passed while it waited or, with `answering`, was answered."""

    deadline_ns: int
    waited_ns: int
    answering: bool


class NoneUp(_Cause, frozen=True):
    """It waited, and no backend that could serve it was up."""

    waited_ns: int


class WaitedTooLong(_Cause, frozen=True):
    """It waited for as long as its class allows."""

    waited_ns: int
    klass: str
    limit_ns: int


class ReachedTooLate(_Cause, frozen=True):
    """Its turn came with too little of its deadline left to read its prompt."""

    waited_ns: int
    left_ns: int
    backend: EngineId
    reading_ns: int
    tokens: int


class NotFetched(_Cause, frozen=True):
    """Its adapter's weights could not be brought."""

    text: Quote


class NotLoaded(_Cause, frozen=True):
    """The engine refused its adapter's weights, and no other takes them."""

    backend: EngineId
    text: Quote


# Ended by its client, an operator, or the process.


class CancelledByClient(_Cause, frozen=True):
    """The client cancelled it or went away."""


class Revoked(_Cause, frozen=True):
    """Its credential was revoked or has expired."""


class CancelledByOperator(_Cause, frozen=True):
    """An operator cancelled it."""


class ReadTooSlowly(_Cause, frozen=True):
    """Its client read the answer too slowly."""


class Stopped(_Cause, frozen=True):
    """The process ends and waits no longer for it; `answering` if its answer had begun."""

    answering: bool


# Ended by its engine.


class Rejected(_Cause, frozen=True):
    """The engine refused the request."""

    text: Quote


class GivenUp(_Cause, frozen=True):
    """It was sent so many times, and met the same fault the last time on a backend."""

    tries: int
    backend: EngineId
    fault: str


class FailedTwice(_Cause, frozen=True):
    """Its engine failed twice before the first token."""

    backend: EngineId
    text: Quote


class Failed(_Cause, frozen=True):
    """Its engine failed after it had sent so many tokens."""

    backend: EngineId
    tokens: int
    text: Quote


class Lost(_Cause, frozen=True):
    """It lost its backends one after the other before the first token, as many as a request visits."""

    backends: tuple[EngineId, ...]
    text: Quote
    visits_max: int


class LostMidway(_Cause, frozen=True):
    """Its backend was lost after the first token."""

    backend: EngineId
    text: Quote


class Unobserved(_Cause, frozen=True):
    """A proxy carried the answer, and never reported how it ended."""


Cause = (
    Said | NoAdapterNamed | UnknownAdapter | UnknownVersion | NotAllowed | ShuttingDown | Quarantined | UnknownClass
    | DeadlineBefore | QueueFull | WaitTooLong | DeadlineTooSoon | PromptTooLong | TooManySequences | NoBackend | Gone
    | NotOwned | OwnerChanged | Moved | LeaseEnded | NoOwner | NoMember | BackendDown | ReplicaAway | Unowned
    | ReplicaLost | BrokeOff | Broken | SidecarFailed | Crashed | Poisonous | DeadlinePassed | NoneUp | WaitedTooLong
    | ReachedTooLate | NotFetched | NotLoaded | CancelledByClient | Revoked | CancelledByOperator | ReadTooSlowly
    | Stopped | Rejected | GivenUp | FailedTwice | Failed | Lost | LostMidway | Unobserved
)  # fmt: skip


class Declined(Exception):
    """A request is not admitted. `name` is its adapter's, if it is about that."""

    def __init__(self, reason: Reason, cause: Cause, name: str = "", retry_after_ns: int | None = None) -> None:
        super().__init__(reason, cause)
        self.reason, self.cause, self.name, self.retry_after_ns = reason, cause, name, retry_after_ns
