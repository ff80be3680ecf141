"""The interface of policies: frozen views in, frozen decisions out.

Ids are ordered: a smaller request id arrived earlier. Times are in ns of the caller's clock, sizes in bytes, pages are
the engine's adapter-cache pages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from policies.record import record

BASE = ""
"""The version id of the base model, which needs no adapter, page or load."""


@runtime_checkable
class Eviction(Protocol):
    """Ranks the keys of a store by how little they would be missed. The store itself handles pins and bytes."""

    def on_insert(self, key: str, size_bytes: int, now_ns: int) -> None:
        """Start tracking `key`."""

    def on_hit(self, key: str, now_ns: int) -> None:
        """Note one use of a tracked key."""

    def on_remove(self, key: str, now_ns: int) -> None:
        """Stop tracking `key`, evicted or not."""

    def victims(self, now_ns: int) -> Iterator[str]:
        """Yield every tracked key once, cheapest to lose first, without changing anything."""

    def snapshot(self) -> Any:
        """Return the whole state as JSON values."""

    def restore(self, state: Any) -> None:
        """Replace the state by one that `snapshot` returned."""


@record(frozen=True, slots=True)
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


@record(frozen=True, slots=True)
class Backlog:
    """What a request finds on its backend at admission, itself included; the basis of a promise. Times in ns."""

    drain_ns: int
    """The expected time to serve all that is outstanding."""
    tenant_drain_ns: int
    """The same for its tenant's part, at the tenant's share of the engine."""
    queue_ns: int
    """The expected time to serve what waits before it."""
    tenant_queue_ns: int
    """The time to serve the rest of what its tenant has outstanding, at the tenant's share of the engine."""
    token_ns: float
    """The expected engine time per token of any answer."""
    run_ns: int
    """A long run by recent experience; 0 without any."""
    seat_ns: int
    """The time from one seat that becomes free to the next, by the same."""
    turn_ns: int
    """The longest run of anything outstanding, with the engine full."""
    open: bool
    """Its version holds a slot, or a free one is available for it."""
    blocked: int
    """Versions that wait without a slot."""
    slots: int
    """Versions that may be open at once."""
    seats: int
    """Requests that may run at once."""
    patience_ns: int
    """How long a request of its class waits, at least, before others are held back for it."""
    limit_ns: int
    """How long a request of its class may wait before it expires."""
    fetch_ns: int
    """The time allowed for its adapter to reach the host store; 0 if it is there."""


@record(frozen=True, slots=True)
class Promise:
    """The promise given at admission: durations in ns since arrival, never raised."""

    expected_ns: int
    """It is likely to be sent by then."""
    bound_ns: int
    """It has its first token by then."""
    overdue_ns: int
    """From then on others are held back for it."""
    urgent_ns: int
    """From then on only older requests go before it."""


class Hold(Enum):
    """Why a policy holds back a request that could be sent."""

    TURN = "turn"
    """Its version's time in the slot is over, or a request that has waited longer goes first."""
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
    """What a backend can take now. `can_open` and `can_send` are the core's own checks, so advice and act agree."""

    @property
    def backend(self) -> str: ...

    @property
    def seats(self) -> int:
        """Requests that may run at once."""

    @property
    def seats_free(self) -> int: ...

    @property
    def pages_free(self) -> int | None:
        """Pages available to versions yet to be opened; None without a limit."""

    @property
    def open(self) -> Mapping[str, OpenVersion]:
        """The versions that hold a slot, in the order in which they were opened."""

    def is_ready(self, version: str) -> bool:
        """Return True if a version lacks only what open ones hold: a slot, or space in the host store."""

    @property
    def at_hand(self) -> Collection[str]:
        """The queued versions whose weights the engine or the host store has. No other can be opened now."""

    def can_open(self, version: str) -> bool: ...

    def can_send(self, request_id: int) -> bool: ...


@record(frozen=True, slots=True)
class Send:
    """Dispatch this request; `OrderingView.can_send` must be True for it."""

    request: int


@record(frozen=True, slots=True)
class Open:
    """Give this version a slot and load it if needed; `OrderingView.can_open` must be True for it."""

    version: str


@record(frozen=True, slots=True)
class Close:
    """Free the slot of a version without runs."""

    version: str


Decision = Send | Open | Close


@runtime_checkable
class Ordering(Protocol):
    """Decides, for one backend, which versions are open and which request goes next.

    One that implements `HearsOfVoids` is also told when promises become void.
    """

    def promise(self, request: Waiting, backlog: Backlog, now_ns: int) -> Promise | None:
        """Return the promise to a request at admission; None if nothing bounds its wait."""

    def queued(self, request: Waiting, promise: Promise | None, now_ns: int) -> None:
        """Note that a request was queued. A healed one returns under its old id, with its promise void."""

    def left(self, request_id: int, now_ns: int) -> None:
        """Note that a request left the queue: sent, dropped or moved to another backend."""

    def ended(self, request: Waiting, output_tokens: int, now_ns: int) -> None:
        """Note that a request that was sent has ended."""

    def progressed(self, tokens: Mapping[int, int], now_ns: int) -> None:
        """Note the tokens that running requests produced since the last call."""

    def choose(self, room: OrderingView, now_ns: int) -> Decision | None:
        """Return the next decision, or None if nothing can or should be done. Called until it returns None."""

    def holds(self, request_id: int) -> Hold | None:
        """Return why the policy itself holds back this queued request, or None."""

    def snapshot(self) -> Any:
        """Return the whole state as JSON values."""

    def restore(self, state: Any) -> None:
        """Replace the state by one that `snapshot` returned."""


@runtime_checkable
class HearsOfVoids(Protocol):
    """An ordering policy that hears when promises of queued requests become void, and may then keep others first."""

    def voided(self, requests: Collection[int]) -> None:
        """Note that nothing bounds the waits of these queued requests any more."""


@record(frozen=True, slots=True)
class Candidate:
    """A backend that can serve the request, as it is now. "The version" is the request's own."""

    backend: str
    resident: bool
    """The version is, or is being loaded, in the engine's cache as far as is known."""
    open: bool
    """The version holds a slot here."""
    awaited: bool
    """Requests for the version are queued here, or it is open here."""
    held: int
    """Versions believed to be in the engine's cache."""
    running: int
    """Sequences and loads at the engine."""
    queued: int
    """Requests queued for this engine."""
    seats: int
    slots: int | None
    """How many versions of this size may be open at once; None while unknown."""
    slots_free: int | None
    """How many more of them may be opened now, with idle ones closed."""
    pages: int
    """Cache pages that the version takes here; 0 for the base model."""
    work_tokens: int
    """Tokens outstanding here, queued and running, as far as is known."""
    tokens_per_s: float
    """Expected output tokens per second of the busy engine; 0 while unknown."""

    @property
    def in_flight(self) -> int:
        """Requests queued and running at the backend."""
        return self.running + self.queued


class Candidates(Protocol):
    """The backends that can serve a request: up, fit for its version, with enough context for its prompt.

    A candidate is built when it is read, so a policy that knows where a version lives pays for its hosts only.
    """

    @property
    def backends(self) -> tuple[str, ...]:
        """Their ids in configured order; at least one."""

    @property
    def in_flight(self) -> int:
        """Requests queued and running on all backends, including those that are no candidates."""

    @property
    def rank(self) -> int:
        """The largest rank of the request's version; 0 for the base model."""

    def __getitem__(self, backend: str) -> Candidate:
        """Return one of `backends` as it is now. Raises KeyError for any other."""

    def in_flights(self) -> list[int]:
        """Return `in_flight` of every candidate, in the order of `backends`, without building one."""

    def residents(self) -> Collection[str]:
        """Return those of `backends` whose candidate is `resident`, without building one."""

    def __iter__(self) -> Iterator[Candidate]:
        """Build and yield every candidate, in the order of `backends`."""

    def __len__(self) -> int:
        """Return how many there are."""


@record(frozen=True, slots=True)
class Choice:
    """The chosen backend and a short reason for the log."""

    backend: str
    reason: str


@runtime_checkable
class Routing(Protocol):
    """Picks one of the backends that can serve a request.

    A policy learns of backends that come and go, and of time, only from the arguments of `pick`. One that implements
    `HearsOfRemovals` is also told when a backend is gone for good.
    """

    def pick(self, request: Waiting, candidates: Candidates, now_ns: int) -> Choice:
        """Return one of `candidates`. Called again for a request that returns from a lost backend."""

    def snapshot(self) -> Any:
        """Return the whole state as JSON values."""

    def restore(self, state: Any) -> None:
        """Replace the state by one that `snapshot` returned."""


@runtime_checkable
class HearsOfRemovals(Protocol):
    """A routing policy with state per backend, which it drops when a backend is gone for good."""

    def backend_removed(self, backend: str) -> None:
        """Forget a backend. A later one with the same id is a new one."""


@record(frozen=True, slots=True)
class Sized:
    """A version and the bytes of its packed form."""

    version: str
    size_bytes: int


class Spare(Protocol):
    """The unclaimed space of one place: an engine's cache, or the host store. Everything is computed when read.

    An engine takes only versions that requests wait for. The host store takes only versions that no request waits for:
    the others are fetched for their requests anyway.
    """

    @property
    def budget_bytes(self) -> int:
        """The most bytes that versions without waiting requests may add up to."""

    @property
    def free_bytes(self) -> int:
        """Free bytes for them; beyond these something must be evicted."""

    def coming(self) -> Iterator[Sized]:
        """Yield the versions that requests wait for and that could be brought here, first queue position first."""

    def losing(self) -> Iterator[Sized]:
        """Yield what would be evicted for versions that no request waits for, first victim first."""

    def can_bring(self, version: str) -> bool:
        """Return True if the version could be brought here now, if it were the only one."""


@runtime_checkable
class Prefetch(Protocol):
    """Advises what to bring in before a request has to wait for it. The core may follow any part of the advice."""

    def on_request(self, version: str, size_bytes: int, now_ns: int) -> None:
        """Note that a request was admitted; its version's packed form takes `size_bytes` where it was routed."""

    def advise(self, spare: Spare, now_ns: int) -> Sequence[str]:
        """Return versions for which `spare.can_bring` is True, each once, most useful first; change nothing.

        Those not in `spare.coming()` add up to at most `spare.budget_bytes`.
        """

    def snapshot(self) -> Any:
        """Return the whole state as JSON values."""

    def restore(self, state: Any) -> None:
        """Replace the state by one that `snapshot` returned."""
