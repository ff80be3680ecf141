"""Describe the moments of a request's life, one sentence each."""

from __future__ import annotations

from policies.views import Candidate
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.durations import seconds
from sidecar.core.state import Request, State
from sidecar.incident.obstacles import listed
from sidecar.incident.witness import Routed

CANDIDATES_NAMED_MAX = 4


def arrived(state: State, request: Request | None) -> str:
    """Return the position of a new request in its queue; `state` is the state after its arrival."""
    if request is None:
        return "arrived"
    if request.running:
        return "arrived, and nobody stood before it"
    if request.backend is None:
        return f"arrived; no backend can take it, as {len(state.unrouted) - 1} others"
    backend = state.backends[request.backend]
    own = len(backend.queued_by_version[request.version]) - 1
    return f"arrived as number {len(backend.queued)} in the queue of {backend.id}, {own} before it of its own version"


def routed(choice: Routed) -> str:
    """Return the routing policy's choice for a request, its reason, and the other candidates."""
    chosen = choice.choice
    others = [_candidate(candidate) for candidate in choice.candidates]
    return f"routed to {chosen.backend} ({chosen.reason}) of {listed(others, CANDIDATES_NAMED_MAX)}"


def _candidate(candidate: Candidate) -> str:
    known = "resident, " if candidate.resident else "awaited, " if candidate.awaited else ""
    return f"{candidate.backend} [{known}{candidate.running}/{candidate.seats} running, {candidate.queued} queued]"


def sent(dispatch: do.Dispatch) -> str:
    again = f", attempt {dispatch.attempt}" if dispatch.attempt > 1 else ""
    version = f" as {dispatch.name}@v{dispatch.ordinal}" if dispatch.name else ""
    return f"sent to {dispatch.backend}{version} ({dispatch.cache.value}{again})"


def ended(settle: do.Settle) -> str:
    tokens = f", {settle.output_tokens} tokens" if settle.output_tokens else ""
    because = f" ({settle.reason.value}): {settle.message}" if settle.reason is not None else ""
    return f"ended: {settle.outcome.value}{tokens}{because}"


LEFT = "its client cancelled it or went away"


def own_event(event: ev.Event, request: int, attempt: int) -> tuple[str, str] | None:
    """Return the kind and the sentence of an event of the request itself, or None for any other event."""
    if isinstance(event, ev.ClientLeft) and event.request == request:
        if event.by_operator:
            return "cancelled", "an operator cancelled it"
        if event.revoked:
            return "cancelled", "its credential was revoked or has expired"
        return ("moved", "it moved to another replica") if event.moved else ("client_left", LEFT)
    if isinstance(event, ev.ClientStalled) and event.request == request:
        return "client_stalled", "its client was too far behind for too long"
    if isinstance(event, ev.FirstToken) and (event.request, event.attempt) == (request, attempt):
        return "first_token", "first token"
    if isinstance(event, ev.RunFailed) and (event.request, event.attempt) == (request, attempt):
        return "run_failed", f"the engine failed ({event.fault.value}): {event.text}"
    return None


def duration(duration_ns: int) -> str:
    """Format a duration with about three digits, however short it is."""
    if 0 < duration_ns < 1_000_000:
        return f"{duration_ns / 1e6:.2f} ms"
    if duration_ns < 100_000_000_000 and duration_ns >= 1_000_000_000:
        return f"{duration_ns / 1e9:.2f} s"
    return seconds(duration_ns)
