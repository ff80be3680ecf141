"""A request as fronts hand it to the gateway, and the router to other replicas as the gateway needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic_ns
from typing import NamedTuple, Protocol

from policies.record import record
from sidecar.access.keys import without_secrets
from sidecar.backends.api import Ticket
from sidecar.config import identities
from sidecar.config.identities import checked, clipped
from sidecar.core import events as ev
from sidecar.core.causes import Cause
from sidecar.errors import Reason, Refused

COUNT_MAX = 1 << 28
"""Largest count of tokens or sequences: more than any engine produces. A client may write any number."""


class TraceOrigin(NamedTuple):
    """The trace context that a request came with, as W3C's headers, "" for none, and when its front began with it."""

    traceparent: str = ""
    tracestate: str = ""
    began_ns: int = 0

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> TraceOrigin:
        return cls(headers.get("traceparent", ""), headers.get("tracestate", ""), monotonic_ns())


NO_TRACE = TraceOrigin()


@dataclass
class RequestFacts:
    """What the core must know of a request; `deadline_s` is in seconds from now. It is its front's until `submit`.

    Counts are limited to COUNT_MAX: they are added up, sent to other replicas and written to the journal.
    """

    adapter: str
    tenant: str = ""
    klass: str = "default"
    input_tokens: int = 0
    output_tokens_max: int = 0
    deadline_s: float | None = None
    session: str = ""
    size_bytes: int = 0
    """Size of the client's message."""
    only: tuple[str, ...] = ()
    """The backends that it may go to; () for any."""
    sequences: int = 1
    """The number of sequences that the engine runs for it."""
    versions: tuple[int, ...] | None = None
    """The ordinals that the policy lets answer it; None for any. A question of our own names its version beforehand."""
    has_length: bool = True
    """False if the client has set no `output_tokens_max`: then that is an assumption."""
    is_estimated: bool = False
    """True if `input_tokens` are the bytes of a text, whose tokens nothing has counted."""
    operation: str = "text_completion"
    """What its client asks for, as the GenAI conventions name it, whatever its engine gets."""
    trace: TraceOrigin = NO_TRACE
    waited_ns: int = 0
    """How long it has waited since it came to the first replica, before this replica's core gets it."""

    def __post_init__(self) -> None:
        self.input_tokens = min(self.input_tokens, COUNT_MAX)
        self.output_tokens_max = min(self.output_tokens_max, COUNT_MAX)
        self.sequences = min(self.sequences, COUNT_MAX)

    def check(self) -> None:
        """Raise Refused(INVALID_REQUEST) for a malformed name. Every front relies on it."""
        checked(identities.ADAPTER, self.adapter)
        if self.adapter.endswith("@"):  # such as NAME@$VERSION of an empty variable: the current version was not meant
            name = clipped(self.adapter)
            raise Refused(
                Reason.INVALID_REQUEST,
                f'"{name}" names no version after the "@"; name one, as in "{name}v2", or leave the "@" out for the '
                "current one",
            )
        checked(identities.TENANT, self.tenant)
        checked(identities.CLASS, self.klass)
        checked(identities.SESSION, self.session)

    def received(self, request: int, deadline_ns: int | None, client_id: str = "") -> ev.Received:
        """Return the event that tells the core of it. The journal has it, and so must not have an API key in it."""
        return ev.Received(
            request, without_secrets(self.adapter), without_secrets(self.tenant), without_secrets(self.klass),
            self.input_tokens, self.output_tokens_max, deadline_ns, self.session, self.size_bytes, self.only,
            self.sequences, without_secrets(client_id), self.versions,
        )  # fmt: skip


@record(frozen=True, slots=True)
class PassedOn:
    """An open request at the replica that owns a backend; `owner` and `backend` are "" while it looks for one."""

    ticket: Ticket
    facts: RequestFacts
    age_s: float
    owner: str = ""
    backend: str = ""


class Elsewhere(Protocol):
    """The router to the other replicas: a request may go to one of them, or come back to be sent to another."""

    def submit(self, ticket: Ticket, facts: RequestFacts) -> None:
        """Admit a request here (`Gateway.admit`) or at another replica. Raises Refused if the queue is full."""

    @property
    def may_dispatch(self) -> Callable[[str], bool]:
        """Tells whether this replica owns a backend at this moment: called right before every write to it."""

    @property
    def takes_requests(self) -> bool:
        """True if another replica would take a request now."""

    def serves(self, backend: str) -> bool:
        """Return True if the replica that owns a backend sends requests there now."""

    def given_back(self, ticket: Ticket) -> bool:
        """Return True if it takes care of a request that this replica's core has given back without a token."""

    def end(self, ticket: Ticket, reason: Reason, cause: Cause) -> bool:
        """End a request that is at another replica, through its ticket; return False if it is here."""

    def passed_on(self) -> Iterator[PassedOn]:
        """Yield the open requests that are at another replica, or looking for one."""

    def ended_with(self, ticket: Ticket) -> Sequence[str]:
        """Return the replicas that ended while they had a request."""

    def abandon(self) -> None:
        """Let go of all requests that are at other replicas; each has its ending already."""
