"""Effects: what the shell must do, in the imperative. They carry ids; their results come back as events."""

from __future__ import annotations

from policies.record import record
from sidecar.core.causes import Cause
from sidecar.core.enums import Cache, Outcome, Voided
from sidecar.core.facts import Layout, Packed, Suspicion
from sidecar.core.misfits import Placed
from sidecar.errors import Reason


@record(frozen=True, slots=True)
class Fetch:
    """Bring a blob into memory; answered by Fetched or FetchFailed.

    The blob is fetched from its origin and packed for `layout`, or read from the disk tier with `from_disk`.
    """

    key: str
    digest: str
    origin: str
    layout: Layout
    size_bytes: int
    from_disk: bool = False


@record(frozen=True, slots=True)
class Drop:
    """Free a packed blob's memory."""

    key: str


@record(frozen=True, slots=True)
class Spill:
    """Write a packed blob to the disk tier; answered by Spilled or SpillFailed."""

    key: str


@record(frozen=True, slots=True)
class DropDisk:
    """Delete a packed blob from the disk tier."""

    key: str


@record(frozen=True, slots=True)
class Load:
    """Bring a packed blob into a backend; answered by LoadDone or LoadFailed."""

    load: int
    backend: str
    name: str
    digest: str
    packed: Packed
    epoch: int = 0
    """The epoch under which this replica owns the backend; 0 with a single replica."""


@record(frozen=True, slots=True)
class Dispatch:
    """Send a request to a backend; answered by FirstToken, RunEnded, RunFailed."""

    request: int
    attempt: int
    backend: str
    name: str
    digest: str
    ordinal: int
    task_id: int
    cache: Cache
    queue_ns: int
    load_ns: int
    heals: int
    packed_key: str = ""
    """The packed form that the request runs with, "" for the base model."""
    attach: bool = False
    """Send the weights along with the request."""
    epoch: int = 0
    """The epoch under which this replica owns the backend; 0 with a single replica."""


@record(frozen=True, slots=True)
class CancelRun:
    """Stop a run at its backend; answered by RunEnded or RunFailed."""

    request: int
    attempt: int
    backend: str


@record(frozen=True, slots=True)
class RegisterRegions:
    """Register the clients' shared-memory regions with a backend that has forgotten them."""

    backend: str


@record(frozen=True, slots=True)
class Probe:
    """Ask a silent engine for a sign of life within `within_ns`; answered by BackendProbed unless it is lost."""

    backend: str
    within_ns: int


@record(frozen=True, slots=True)
class Settle:
    """End a request, exactly once. `reason` is None when it was answered in full."""

    request: int
    outcome: Outcome
    name: str
    tenant: str
    klass: str
    queue_ns: int
    input_tokens: int
    output_tokens: int = 0
    reason: Reason | None = None
    cause: Cause | None = None
    """Why in detail; None where `reason` is."""
    backend: str = ""
    version: str = ""
    retry_after_ns: int | None = None
    bound_ns: int | None = None
    """The promised longest wait; None if nothing was promised or the promise is void."""
    voided: Voided | None = None
    """Why the promise became void."""
    is_estimated: bool = False
    """`output_tokens` is an estimate, since the answer went past the sidecar."""


@record(frozen=True, slots=True)
class Heal:
    """Report to observers that a wrong belief or a fault was mended at no client's cost. Asks for no action."""

    backend: str
    reason: str
    version: str


@record(frozen=True, slots=True)
class Quarantine:
    """Report to observers that a version is refused until an operator releases it."""

    digest: str
    suspicion: Suspicion


@record(frozen=True, slots=True)
class Answer:
    """Reply to an operator: what became of an adapter, place by place."""

    ask: int
    places: tuple[Placed, ...]


@record(frozen=True, slots=True)
class WakeAt:
    """Send a Tick at or after this time; replaces any earlier WakeAt."""

    at_ns: int


Effect = (
    Fetch | Drop | Spill | DropDisk | Load | Dispatch | CancelRun | RegisterRegions | Probe | Settle | Heal
    | Quarantine | Answer | WakeAt
)  # fmt: skip
