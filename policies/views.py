"""What policies see and what they answer: frozen views in, frozen decisions out.

Ids are ordered: a smaller request id arrived earlier. Times are nanoseconds of the caller's clock, sizes are bytes,
pages are the engine's adapter-cache pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

BASE = ""
"""The version id of the base model: it needs no adapter, no page and no load."""


class Eviction(Protocol):
    """Ranks what a store holds by how little it would be missed. Pins and bytes are the store's business."""

    def on_insert(self, key: str, size_bytes: int, now_ns: int) -> None:
        """Start tracking `key`."""

    def on_hit(self, key: str, now_ns: int) -> None:
        """Note one use of a tracked key."""

    def on_remove(self, key: str, now_ns: int) -> None:
        """Stop tracking `key`, evicted or not."""

    def victims(self, now_ns: int) -> Iterator[str]:
        """Yield every tracked key once, cheapest to lose first, changing nothing."""

    def snapshot(self) -> Any:
        """Return the whole state as JSON values."""

    def restore(self, state: Any) -> None:
        """Replace the state by one that `snapshot` returned."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in a backend's queue."""

    id: int
    version: str
    name: str
    tenant: str
    klass: str
    arrived_ns: int
    input_tokens: int
    output_tokens_max: int
    weight: float = 1.0
    """The tenant's share of the service, relative to others'."""
    sequences: int = 1
    """The seats that it takes while it runs."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """What a request finds on its backend when it is admitted, itself included: what a promise can rest on."""

    drain_ns: int
    """To serve all that is outstanding, as expected."""
    tenant_drain_ns: int
    """To serve what is outstanding of its tenant at the tenant's share of the engine."""
    queue_ns: int
    """To serve what waits before it, as expected."""
    tenant_queue_ns: int
    """To serve what else is outstanding of its tenant at the tenant's share of the engine."""
    token_ns: float
    """What a token of anybody's answer takes of the engine, as expected."""
    run_ns: int
    """A long run, as they have been of late; 0 while none was seen."""
    turn_ns: int
    """The longest run of anything outstanding, with the engine full."""
    open: bool
    """Its version holds a slot, or there is a free one for it."""
    blocked: int
    """Versions that wait without a slot."""
    slots: int
    """Versions that may be open at once."""
    seats: int
    """Requests that may run at once."""
    patience_ns: int
    """How long a request of its class may wait before others are held back for it, however short the queue."""
    limit_ns: int
    """How long a request of its class waits at most before it ends."""
    fetch_ns: int
    """What its adapter's way into the host store may take; 0 when it is there."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What a request is told at admission; durations since its arrival, never raised."""

    expected_ns: int
    """It is likely to be sent by then."""
    bound_ns: int
    """It has its first token by then."""
    overdue_ns: int
    """From then on others are held back for it."""
    urgent_ns: int
    """From then on only older requests go before it."""


class Hold(Enum):
    """Why a policy holds a request back that there would be room for."""

    TURN = "turn"
    """Its version's turn is over, or somebody's who waits for longer comes first."""
    SHARE = "share"
    """Its tenant has been served more than others that wait."""


class OpenVersion(Protocol):
    """A version that holds a slot for dispatching on this backend."""

    @property
    def opened_ns(self) -> int: ...

    @property
    def pages(self) -> int: ...

    @property
    def running(self) -> int: ...

    @property
    def loading(self) -> bool: ...


class OrderingView(Protocol):
    """What a backend can take now. The two questions are the core's own, so advice and act cannot disagree."""

    @property
    def backend(self) -> str: ...

    @property
    def seats(self) -> int:
        """Requests that may run at once."""

    @property
    def seats_free(self) -> int: ...

    @property
    def pages_free(self) -> int | None:
        """Pages that versions yet to be opened may take; None without a limit."""

    @property
    def open(self) -> Mapping[str, OpenVersion]:
        """The versions that hold a slot, in the order in which they were opened."""

    def is_ready(self, version: str) -> bool:
        """Whether a version needs only what open ones hold: a slot, or room in the host store for its weights."""

    def can_open(self, version: str) -> bool: ...

    def can_send(self, request_id: int) -> bool: ...


Room = OrderingView
"""Its name until 0.2: policies of other packages may import it by that for one release more."""


@dataclass(frozen=True, slots=True)
class Send:
    """Dispatch this request; `OrderingView.can_send` must have said yes."""

    request: int


@dataclass(frozen=True, slots=True)
class Open:
    """Give this version a slot, loading it if need be; `OrderingView.can_open` must have said yes."""

    version: str


@dataclass(frozen=True, slots=True)
class Close:
    """Take the slot of a version nothing of which is running."""

    version: str


Decision = Send | Open | Close


class Ordering(Protocol):
    """Decides, for one backend, which versions are open and which request goes next."""

    def promise(self, request: Waiting, backlog: Backlog, now_ns: int) -> Promise | None:
        """Say how long a request that is being admitted waits at most; None where nothing bounds it."""

    def queued(self, request: Waiting, promise: Promise | None, now_ns: int) -> None:
        """A request joined the queue; a healed one comes back under its old id, its promise void."""

    def left(self, request_id: int, now_ns: int) -> None:
        """A request left the queue: sent, dropped or moved to another backend."""

    def ended(self, request: Waiting, output_tokens: int, now_ns: int) -> None:
        """A request that was sent has ended."""

    def progressed(self, tokens: Mapping[int, int], now_ns: int) -> None:
        """Running requests produced this many tokens since the last call."""

    def choose(self, room: OrderingView, now_ns: int) -> Decision | None:
        """Return the next decision, or None when nothing can or should be done. Called until it says None."""

    def holds(self, request_id: int) -> Hold | None:
        """Say why the policy itself holds this queued request back, if it does."""

    def snapshot(self) -> Any:
        """Return the whole state as JSON values."""

    def restore(self, state: Any) -> None:
        """Replace the state by one that `snapshot` returned."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend that can serve the request, as it is now. What is about a version is about the request's own."""

    backend: str
    resident: bool
    """The version is in the engine's cache as far as is known, or on its way there."""
    open: bool
    """The version holds a slot here."""
    awaited: bool
    """Requests for the version wait in this backend's queue, or it is open here."""
    held: int
    """Versions believed to be in the engine's cache."""
    running: int
    """Sequences and loads at the engine."""
    queued: int
    """Requests that wait here for this engine."""
    seats: int
    slots: int | None
    """How many versions of this one's size may be open at once; None while that is not known."""
    slots_free: int | None
    """How many more of them may be opened now, idle ones closed."""
    pages: int
    """Cache pages that the version takes here; 0 for the base model."""
    work_tokens: int
    """Tokens outstanding here, queued and running, as far as is known."""
    tokens_per_s: float
    """Output tokens a second that the engine is expected to produce when busy; 0 while that is not known."""

    @property
    def in_flight(self) -> int:
        """Requests that are the backend's business: queued and running."""
        return self.running + self.queued


class Candidates(Protocol):
    """The backends that can serve a request: up, fit for its version, long enough for its prompt.

    A candidate is built when it is asked for, so a policy that knows where a version lives looks at its hosts alone.
    """

    @property
    def backends(self) -> tuple[str, ...]:
        """Their ids in the order of the configuration: at least one."""

    @property
    def in_flight(self) -> int:
        """Requests queued and running on all backends, those that are no candidates included."""

    @property
    def rank(self) -> int:
        """The largest rank of the request's version; 0 for the base model."""

    def __getitem__(self, backend: str) -> Candidate:
        """Return one of `backends` as it is now. Raises KeyError for any other."""

    def __iter__(self) -> Iterator[Candidate]:
        """Build and yield every candidate, in the order of `backends`."""

    def __len__(self) -> int:
        """Return how many there are."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend picked and, in a few words for the log, why."""

    backend: str
    reason: str


class Routing(Protocol):
    """Picks one of the backends that can serve a request: filter, score in [0, 1], pick.

    Nothing but `pick` tells a policy of backends that come and go, or of time: `Candidates.backends` and `now_ns` do.
    One that is gone for good is told to policies that are `HearsOfRemovals` too.
    """

    def pick(self, request: Waiting, candidates: Candidates, now_ns: int) -> Choice:
        """Return one of `candidates`. Called again for a request that comes back from a backend that was lost."""

    def snapshot(self) -> Any:
        """Return the whole state as JSON values."""

    def restore(self, state: Any) -> None:
        """Replace the state by one that `snapshot` returned."""


@runtime_checkable
class HearsOfRemovals(Protocol):
    """A routing policy that keeps something of each backend, and forgets it when a backend is gone for good."""

    def backend_removed(self, backend: str) -> None:
        """Forget a backend. One that comes later by the same id is another one."""


@dataclass(frozen=True, slots=True)
class Sized:
    """A version and the bytes that its packed form takes."""

    version: str
    size_bytes: int


class Spare(Protocol):
    """Room that nobody has a claim to, in one place: the cache of an engine, or the host store.

    Into an engine comes only what requests wait for; into the host store, only what nobody waits for: the rest is
    fetched for them anyway. All of it is worked out when it is asked for.
    """

    @property
    def budget_bytes(self) -> int:
        """What nobody waits for may add up to so many bytes."""

    @property
    def free_bytes(self) -> int:
        """Bytes for it that are free; past them something has to go."""

    def coming(self) -> Iterator[Sized]:
        """Yield the versions that requests wait for and that could come here, first queue position first."""

    def losing(self) -> Iterator[Sized]:
        """Yield what would have to go for what nobody waits for, first to go first."""

    def can_bring(self, version: str) -> bool:
        """Whether the version could be brought here now, were it the only one."""


class Prefetch(Protocol):
    """Says what to bring in before somebody has to wait for it. It is advice: the core may take part of it, or none."""

    def on_request(self, version: str, size_bytes: int, now_ns: int) -> None:
        """A request for a version was admitted; packed, the version takes so many bytes where it was routed."""

    def advise(self, spare: Spare, now_ns: int) -> Sequence[str]:
        """Return versions that `spare.can_bring`, each once, most useful first; changes nothing.

        Those that are not in `spare.coming()` add up to `spare.budget_bytes` at most.
        """

    def snapshot(self) -> Any:
        """Return the whole state as JSON values."""

    def restore(self, state: Any) -> None:
        """Replace the state by one that `snapshot` returned."""
