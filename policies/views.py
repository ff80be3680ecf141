"""What policies see and what they answer: frozen views in, frozen decisions out.

Ids are ordered: a smaller request id arrived earlier. Times are nanoseconds of the caller's clock, sizes are bytes,
pages are the engine's adapter-cache pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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


@dataclass(frozen=True, slots=True)
class OpenVersion:
    """A version that holds a slot for dispatching on this backend."""

    version: str
    opened_ns: int
    pages: int
    running: int
    loading: bool


@dataclass(frozen=True, slots=True)
class Room:
    """What a backend can take now. The two questions are the core's own, so advice and act cannot disagree."""

    backend: str
    seats_free: int
    pages_free: int | None
    open: Sequence[OpenVersion]
    can_open: Callable[[str], bool]
    can_send: Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class Send:
    """Dispatch this request; `Room.can_send` must have said yes."""

    request: int


@dataclass(frozen=True, slots=True)
class Open:
    """Give this version a slot, loading it if need be; `Room.can_open` must have said yes."""

    version: str


@dataclass(frozen=True, slots=True)
class Close:
    """Take the slot of a version nothing of which is running."""

    version: str


Decision = Send | Open | Close


class Ordering(Protocol):
    """Decides, for one backend, which versions are open and which request goes next."""

    def queued(self, request: Waiting, now_ns: int) -> None:
        """A request joined the queue; a healed one comes back under its old id."""

    def left(self, request_id: int, now_ns: int) -> None:
        """A request left the queue: sent, dropped or moved to another backend."""

    def ended(self, request: Waiting, output_tokens: int, now_ns: int) -> None:
        """A request that was sent has ended."""

    def progressed(self, tokens: Mapping[int, int], now_ns: int) -> None:
        """Running requests produced this many tokens since the last call."""

    def choose(self, room: Room, now_ns: int) -> Decision | None:
        """Return the next decision, or None when nothing can or should be done. Called until it says None."""

    def gated(self, request_id: int) -> bool:
        """Say whether the policy itself holds this queued request back."""

    def snapshot(self) -> Any:
        """Return the whole state as JSON values."""

    def restore(self, state: Any) -> None:
        """Replace the state by one that `snapshot` returned."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend that can serve the request."""

    backend: str
    resident: bool
    """The version is in the engine's cache as far as is known, or on its way there."""
    awaited: bool
    """Requests for the version already wait in this backend's queue."""
    held: int
    """Versions believed to be in the engine's cache."""
    running: int
    queued: int
    seats: int


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend picked and, in a few words for the log, why."""

    backend: str
    reason: str


class Routing(Protocol):
    """Picks one of the backends that can serve a request: filter, score in [0, 1], pick."""

    def pick(self, request: Waiting, candidates: Sequence[Candidate], now_ns: int) -> Choice:
        """Return one of `candidates`, which is never empty."""

    def snapshot(self) -> Any:
        """Return the whole state as JSON values."""

    def restore(self, state: Any) -> None:
        """Replace the state by one that `snapshot` returned."""
