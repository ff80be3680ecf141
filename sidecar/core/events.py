"""What has happened, in the past tense. Sizes and ids only: no prompt, token or weight ever enters the core.

Two lanes lead here: what clients and operators asked (bounded, refused at the door) and what engines and the store
reported (bounded by what is in flight, never refused, taken first).
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.core.enums import Fault
from sidecar.core.facts import Adapter, EngineFacts
from sidecar.errors import Reason


@dataclass(frozen=True, slots=True)
class Received:
    """A client's request. `request` is numbered in order of arrival; `adapter` is as the client wrote it."""

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
    """The backends that it may go to; any if none is named."""
    sequences: int = 1
    """How many sequences it makes its engine run, a seat each; `output_tokens_max` is of all of them together."""
    client_id: str = ""
    """What its client calls it. Nothing is decided by it, and others may have the same."""


@dataclass(frozen=True, slots=True)
class ClientLeft:
    """The client cancelled, or its connection went away; or the request goes on at another replica."""

    request: int
    moved: bool = False


@dataclass(frozen=True, slots=True)
class ClientStalled:
    """The client was too far behind for too long: more of its answer waited than is kept."""

    request: int


@dataclass(frozen=True, slots=True)
class OtherVersion:
    """A version that a name does not stand for, but that can be asked for by ordinal or digest.

    `kept` ones stay in the store, so that going back to them never waits for an origin.
    """

    ordinal: int
    adapter: Adapter
    origin: str
    generation: int = 0
    kept: bool = False


@dataclass(frozen=True, slots=True)
class AdapterRegistered:
    """What a name is from now on: the version that it stands for, the others, and a share for one of them.

    `canary` is (ordinal, percent): so many in a hundred of (tenant, session) pairs get that version instead.
    """

    name: str
    adapter: Adapter
    origin: str
    ordinal: int = 1
    generation: int = 0
    allow: tuple[str, ...] | None = None
    pinned: bool = False
    others: tuple[OtherVersion, ...] = ()
    canary: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class AdapterUnregistered:
    name: str


@dataclass(frozen=True, slots=True)
class EvictAsked:
    """Drop an adapter from the store now. The reply is an `Answered` effect with this id."""

    ask: int
    name: str


@dataclass(frozen=True, slots=True)
class PrefetchAsked:
    """Bring an adapter into the store, and onto these backends if any are named."""

    ask: int
    name: str
    backends: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReleaseAsked:
    """An operator lifts a version's quarantine."""

    name: str


@dataclass(frozen=True, slots=True)
class DrainSet:
    """A backend takes nothing new, or takes requests again."""

    backend: str
    draining: bool


@dataclass(frozen=True, slots=True)
class ShutdownBegun:
    """Admit nothing new; finish what is here."""


@dataclass(frozen=True, slots=True)
class BackendAdded:
    """A backend is there; it is down until `BackendUp`, and another replica's if it is not `owned`.

    `pool` is the pool that it was found in, "" for one that is configured by its address. `fresh`: it came while this
    process ran.
    """

    backend: str
    facts: EngineFacts
    owned: bool = True
    pool: str = ""
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class BackendLeaving:
    """A backend is about to go: nothing new is sent there. Or it stays after all."""

    backend: str
    leaving: bool


@dataclass(frozen=True, slots=True)
class BackendRemoved:
    """A backend is gone for good. One that comes later by the same id is another one."""

    backend: str
    cause: str


@dataclass(frozen=True, slots=True)
class BackendPlanned:
    """What a backend that joins is to be given: the versions that it loads before it is one among the others.

    For several replicas: their leader plans. One that is alone plans for itself.
    """

    backend: str
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BackendTaken:
    """A backend's queue is this replica's from now on, or still is, under a newer epoch."""

    backend: str
    epoch: int


@dataclass(frozen=True, slots=True)
class BackendGivenUp:
    """A backend's queue is this replica's no more: nothing may be sent there."""

    backend: str
    cause: str


@dataclass(frozen=True, slots=True)
class BackendUp:
    """A backend answers. Nothing is believed of its caches."""

    backend: str
    facts: EngineFacts


@dataclass(frozen=True, slots=True)
class BackendMeasured:
    """The engine's own gauges say how much it takes at once, and how much of its KV cache is in use."""

    backend: str
    seats: int | None
    kv_tokens: int | None
    kv_used: int | None = None


@dataclass(frozen=True, slots=True)
class BackendProbed:
    """A probe has found that a silent engine is alive, or has got no sign of life; `text` says of what."""

    backend: str
    alive: bool
    text: str = ""


@dataclass(frozen=True, slots=True)
class BackendLost:
    backend: str
    cause: str


@dataclass(frozen=True, slots=True)
class Fetched:
    key: str


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """A blob could not be had. From disk: it was damaged or gone, which is no reason to end anything."""

    key: str
    reason: Reason
    text: str


@dataclass(frozen=True, slots=True)
class Spilled:
    """A blob was written to the disk tier, whole."""

    key: str


@dataclass(frozen=True, slots=True)
class SpillFailed:
    key: str
    text: str


@dataclass(frozen=True, slots=True)
class DiskHolds:
    """At start: the disk tier has a blob from an earlier life."""

    key: str
    version: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LoadDone:
    load: int


@dataclass(frozen=True, slots=True)
class LoadFailed:
    load: int
    fault: Fault
    text: str


@dataclass(frozen=True, slots=True)
class FirstToken:
    request: int
    attempt: int


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The engine's final response for a request; also the end of a run that was cancelled."""

    request: int
    attempt: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class RunFailed:
    """The engine's error for a request, after `output_tokens` had reached us."""

    request: int
    attempt: int
    fault: Fault
    text: str
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """Tokens that running requests of one backend produced since the last such event.

    0 is for one that its client keeps from being read: its silence says nothing of the engine.
    """

    backend: str
    tokens: dict[int, int]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed a point that a `WakeAt` effect asked for."""


Event = (
    Received | ClientLeft | ClientStalled | AdapterRegistered | AdapterUnregistered | EvictAsked
    | PrefetchAsked | ReleaseAsked | DrainSet | ShutdownBegun | BackendAdded | BackendLeaving | BackendRemoved
    | BackendPlanned | BackendTaken | BackendGivenUp | BackendUp | BackendMeasured | BackendProbed | BackendLost
    | Fetched | FetchFailed | Spilled | SpillFailed | DiskHolds
    | LoadDone | LoadFailed | FirstToken | RunEnded | RunFailed | Progress | Tick
)  # fmt: skip
