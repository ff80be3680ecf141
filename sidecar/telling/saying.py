"""Describe the moments of a request's life, one sentence each.

A story from a journal and one from the live process use the same sentences.
"""

from __future__ import annotations

from collections.abc import Sequence

from policies.views import Candidate, Choice
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.enums import Voided
from sidecar.core.state import Request, State
from sidecar.telling.durations import readable
from sidecar.telling.endings import quarantined
from sidecar.telling.timeline import FIRST_TOKEN
from sidecar.telling.waits import listed

CANDIDATES_NAMED_MAX = 4

Standing = ev.BackendUp | ev.BackendLost | ev.BackendLeaving | ev.BackendRemoved | ev.DrainSet
Told = tuple[str, str]
"""The kind of a moment, in a word, and its sentence."""


def arrived(state: State, request: Request | None) -> str:
    """Return the position of a new request in its queue; `state` is the state after its arrival."""
    if request is None:
        return "arrived"
    if request.running:
        return "arrived; the queue was empty"
    if request.backend is None:
        return f"arrived; no backend can take it, as {len(state.unrouted) - 1} others"
    backend = state.backends[request.backend]
    own = len(backend.queued_by_version[request.version]) - 1
    return f"arrived as number {len(backend.queued)} in the queue of {backend.id}, {own} before it of its own version"


def queued(backend: str) -> str:
    """Return in whose queue a request is; only a replay knows why."""
    return f"routed to {backend}"


def routed(chosen: Choice, candidates: Sequence[Candidate]) -> str:
    """Return the routing policy's choice for a request, its reason, and the other candidates."""
    others = [_candidate(candidate) for candidate in candidates]
    return f"{queued(chosen.backend)} ({chosen.reason}) of {listed(others, CANDIDATES_NAMED_MAX)}"


def _candidate(candidate: Candidate) -> str:
    known = "resident, " if candidate.resident else "awaited, " if candidate.awaited else ""
    return f"{candidate.backend} [{known}{candidate.running}/{candidate.seats} running, {candidate.queued} queued]"


def sent(dispatch: do.Dispatch) -> str:
    again = f", attempt {dispatch.attempt}" if dispatch.attempt > 1 else ""
    version = f" as {dispatch.name}@v{dispatch.ordinal}" if dispatch.name else ""
    return f"sent to {dispatch.backend}{version} ({dispatch.cache.value}{again})"


def taken_over(backend: str, dispatch: do.Dispatch) -> Told:
    """Describe the move of a waiting request from a backend to one that could send it at once."""
    return "taken_over", f"{dispatch.backend} could send it at once and took it over from {backend}"


def ended(settle: do.Settle, message: str) -> str:
    about = "about " if settle.is_estimated else ""
    tokens = f", {about}{settle.output_tokens} tokens" if settle.output_tokens else ""
    because = f" ({settle.reason.value}): {message}" if settle.reason is not None else ""
    return f"ended: {settle.outcome.value}{tokens}{because}"


def _quoted(text: str) -> str:
    return f": {text}" if text else ""


LEFT = "its client cancelled it or went away"


def own_event(event: ev.Event, request: int, attempt: int) -> Told | None:
    """Return the kind and the sentence of an event of the request itself, or None for any other event."""
    if isinstance(event, ev.ClientLeft) and event.request == request:
        if event.by_operator:
            return "cancelled", "an operator cancelled it"
        if event.revoked:
            return "cancelled", "its credential was revoked or has expired"
        if event.shut_down:
            return "cancelled", "the sidecar stopped and cut it off"
        return ("moved", "it moved to another replica") if event.moved else ("client_left", LEFT)
    if isinstance(event, ev.ClientStalled) and event.request == request:
        return "client_stalled", "its client was too far behind for too long"
    if isinstance(event, ev.FirstToken) and (event.request, event.attempt) == (request, attempt):
        return FIRST_TOKEN, "first token; the rest goes past the sidecar" if event.unseen else "first token"
    if isinstance(event, ev.RunFailed) and (event.request, event.attempt) == (request, attempt):
        return "run_failed", f"the engine failed ({event.fault.value}){_quoted(event.text)}"
    return None


# The way of its version to an engine.

FETCHED = "fetched", "its weights are in the host store"
DROPPED = "dropped", "its weights were dropped from the host store"


def fetch(effect: do.Fetch, dropped: int) -> Told:
    """Describe a fetch; `dropped` counts the blobs of others that made room for it."""
    room = f", for which {dropped} of others had to go" if dropped else ""
    return "fetch", f"a fetch of its weights began from {'disk' if effect.from_disk else 'its origin'}{room}"


def fetch_failed(event: ev.FetchFailed) -> Told:
    return "fetch_failed", f"its weights could not be fetched: {event.text}"


def load(effect: do.Load) -> Told:
    return "load", f"load {effect.load} of its version into {effect.backend} began"


def loaded(event: ev.LoadDone, backend: str) -> Told:
    return "loaded", f"load {event.load} is done: {backend} has its version"


def load_failed(event: ev.LoadFailed) -> Told:
    return "load_failed", f"load {event.load} failed ({event.fault.value}){_quoted(event.text)}"


def heal(effect: do.Heal) -> Told:
    return "heal", f"{effect.backend}: {effect.reason} of its version is being mended"


def quarantine(effect: do.Quarantine) -> Told:
    return "quarantine", f"its version was quarantined: {quarantined(effect.suspicion)}"


def standing(event: Standing) -> Told:
    """Describe what happened to a backend."""
    return "backend", f"{event.backend} {_standing(event)}"


def _standing(event: Standing) -> str:
    if isinstance(event, ev.BackendUp):
        return "is up"
    if isinstance(event, ev.BackendLost):
        return f"was lost: {event.cause}"
    if isinstance(event, ev.BackendRemoved):
        return "was taken out"
    if isinstance(event, ev.BackendLeaving):
        return _leaving(event.serves_queue) if event.leaving else "stays after all"
    return "is being drained" if event.draining else "takes requests again"


def _leaving(serves_queue: bool) -> str:
    waits = ", and what waits here if no other takes it" if serves_queue else ""
    return f"is leaving: it finishes what runs{waits}, and gets nothing new"


def voided(why: Voided) -> Told:
    return "voided", f"what it was promised is void: {why.value}"


QUEUED_AGAIN = "queued_again", "queued again under its old place"
IN_VAIN = "it was sent, and failed there"


def duration(duration_ns: int) -> str:
    """Format a duration with about three digits, however short it is."""
    if 0 < duration_ns < 1_000_000:
        return f"{duration_ns / 1e6:.2f} ms"
    if duration_ns < 100_000_000_000 and duration_ns >= 1_000_000_000:
        return f"{duration_ns / 1e9:.2f} s"
    return readable(duration_ns)
