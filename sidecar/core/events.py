"""Events: what has happened, in the past tense. Ids, names and sizes only; no prompt, token or weight enters the core.

They come in two lanes. Client and operator events are bounded and refused at the door. Engine and store events are
bounded by what is in flight, never refused, and taken first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from policies.record import record
from sidecar.core.config import CoreConfig
from sidecar.core.enums import Fault, Seen
from sidecar.core.facts import EngineFacts, NamedVersion
from sidecar.errors import Reason
from sidecar.model.definition import Definition
from sidecar.model.quote import Quote


@record(frozen=True, slots=True)
class Received:
    """A client's request. `request` numbers arrivals; `adapter` is the reference as the client wrote it."""

    request: int
    adapter: str
    tenant: str
    klass: str
    input_tokens: int
    output_tokens_max: int
    deadline_ns: int | None = None
    session: str = ""
    size_bytes: int = 0
    only: tuple[str, ...] = ()
    """The ids of backends or pools that it may go to; empty means any."""
    sequences: int = 1
    """How many sequences it makes the engine run, one seat each; `output_tokens_max` is the sum over them."""
    client_id: str = ""
    """The client's own id of the request. It need not be unique, and nothing is decided by it."""
    versions: tuple[int, ...] | None = None
    """The ordinals that a policy lets answer it, as it saw the name; None for any."""


@record(frozen=True, slots=True)
class ClientLeft:
    """The client cancelled or disconnected; or, with `moved`, another replica serves the request.

    With `by_operator` an operator cancelled it, with `revoked` its credential has ended, and with `shut_down` the
    sidecar ends and waits for it no longer; the client hears so.
    """

    request: int
    moved: bool = False
    by_operator: bool = False
    revoked: bool = False
    shut_down: bool = False


@record(frozen=True, slots=True)
class ClientStalled:
    """The client read its answer so slowly that more than the buffer limit waited, for too long."""

    request: int


@dataclass(frozen=True, slots=True)
class AdapterRegistered(Definition):
    """The new definition of a name, and its versions, the current one first.

    The versions whose ordinals are `kept` stay in the store, so that a rollback never waits for an origin.
    """

    versions: tuple[NamedVersion, ...] = field(kw_only=True)
    kept: tuple[int, ...] = ()


@record(frozen=True, slots=True)
class AdapterUnregistered:
    name: str


@record(frozen=True, slots=True)
class EvictAsked:
    """An operator asks to drop an adapter from the store now. The reply is an `Answer` effect with this id."""

    ask: int
    name: str


@record(frozen=True, slots=True)
class PrefetchAsked:
    """An operator asks to bring an adapter into the store, and onto `backends` if any are named."""

    ask: int
    name: str
    backends: tuple[str, ...] = ()


@record(frozen=True, slots=True)
class ReleaseAsked:
    """An operator lifts a version's quarantine."""

    name: str


@record(frozen=True, slots=True)
class DrainSet:
    """An operator starts or ends the drain of a backend."""

    backend: str
    draining: bool


@record(frozen=True, slots=True)
class ShutdownBegun:
    """The process shuts down: admit nothing new, finish what is here."""


@record(frozen=True, slots=True)
class BackendAdded:
    """A backend was added. It is down until `BackendUp`, and another replica's unless `owned`.

    `pool` is the pool in which it was discovered, "" for one configured by address. `fresh` means that it
    appeared while this process ran.
    """

    backend: str
    facts: EngineFacts
    owned: bool = True
    pool: str = ""
    fresh: bool = False


@record(frozen=True, slots=True)
class BackendLeaving:
    """A backend is about to go, so nothing new is sent to it; or it stays after all.

    With `serves_queue` it still gets those of its waiting requests that no other backend takes now.
    """

    backend: str
    leaving: bool
    serves_queue: bool = False


@record(frozen=True, slots=True)
class BackendRemoved:
    """A backend is gone for good. A later one with the same id is a new backend.

    `successor` has its id from this moment on; what waited for that id goes on waiting.
    """

    backend: str
    cause: Quote
    successor: BackendAdded | None = None


@record(frozen=True, slots=True)
class ConfigChanged:
    """The configuration was changed while the process runs; the fields in `config.FIXED` are as before."""

    config: CoreConfig


@record(frozen=True, slots=True)
class BackendPlanned:
    """The versions that a joining backend loads before it takes a normal share of requests.

    Only with several replicas, where the leader plans. A single replica plans for itself.
    """

    backend: str
    versions: tuple[str, ...]


@record(frozen=True, slots=True)
class BackendTaken:
    """This replica owns a backend's queue from now on, or still does under a newer epoch."""

    backend: str
    epoch: int


@record(frozen=True, slots=True)
class BackendGivenUp:
    """This replica no longer owns a backend's queue: nothing more may be sent there.

    `cause` is a label of `ownership.enums.Why`.
    """

    backend: str
    cause: str


@record(frozen=True, slots=True)
class BackendUp:
    """A backend was reached. Its caches are believed empty; it has `others` requests that the sidecar did not send."""

    backend: str
    facts: EngineFacts
    others: int = 0


@record(frozen=True, slots=True)
class BackendMeasured:
    """The engine's own gauges: its seats, the size of its KV cache and the tokens in use.

    `others` of its requests the sidecar did not send, or a process before this one did.
    """

    backend: str
    seats: int | None
    kv_tokens: int | None
    kv_used: int | None = None
    others: int = 0


@record(frozen=True, slots=True)
class BackendProbed:
    """The result of a probe of a silent engine; `text` says what it found."""

    backend: str
    alive: bool
    text: Quote = ""


@record(frozen=True, slots=True)
class BackendLost:
    backend: str
    cause: Quote


@record(frozen=True, slots=True)
class Fetched:
    key: str


@record(frozen=True, slots=True)
class FetchFailed:
    """A blob could not be fetched. A failed read from disk means that it was damaged or gone and ends no request."""

    key: str
    reason: Reason
    text: Quote


@record(frozen=True, slots=True)
class Spilled:
    """A whole blob was written to the disk tier."""

    key: str


@record(frozen=True, slots=True)
class SpillFailed:
    key: str
    text: Quote


@record(frozen=True, slots=True)
class DiskHolds:
    """At start: the disk tier has a blob of an earlier process."""

    key: str
    version: str
    size_bytes: int


@record(frozen=True, slots=True)
class LoadDone:
    load: int


@record(frozen=True, slots=True)
class LoadFailed:
    load: int
    fault: Fault
    text: Quote


@record(frozen=True, slots=True)
class FirstToken:
    """The first of an answer; with `unseen` the rest goes past the sidecar, with `unheard` nothing is told of it."""

    request: int
    attempt: int
    unheard: bool = False
    unseen: bool = False


@record(frozen=True, slots=True)
class RunEnded:
    """The engine's final response to a request, or the end of a cancelled run."""

    request: int
    attempt: int
    output_tokens: int
    seen: Seen = Seen.ALL
    client_left: bool = False
    """Its client has left, as whoever carried the answer says."""


@record(frozen=True, slots=True)
class RunFailed:
    """The engine's error for a request, after `output_tokens` tokens had arrived."""

    request: int
    attempt: int
    fault: Fault
    text: Quote
    output_tokens: int = 0


@record(frozen=True, slots=True)
class Progress:
    """Tokens that running requests of one backend produced since the last such event.

    A request whose client blocks reading counts as 0, so that its silence says nothing of the engine.
    """

    backend: str
    tokens: dict[int, int]


@record(frozen=True, slots=True)
class Tick:
    """The time of a `WakeAt` effect has passed."""


Event = (
    Received | ClientLeft | ClientStalled | AdapterRegistered | AdapterUnregistered | EvictAsked
    | PrefetchAsked | ReleaseAsked | DrainSet | ShutdownBegun | BackendAdded | BackendLeaving | BackendRemoved
    | BackendPlanned | BackendTaken | BackendGivenUp | BackendUp | BackendMeasured | BackendProbed | BackendLost
    | ConfigChanged | Fetched | FetchFailed | Spilled | SpillFailed | DiskHolds
    | LoadDone | LoadFailed | FirstToken | RunEnded | RunFailed | Progress | Tick
)  # fmt: skip
