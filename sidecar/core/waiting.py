"""Who waits, how long, against which bound, and why. Read between steps; nothing is changed.

Counting is cheap whatever the queue's length; why a request waits is asked of the oldest ones only, and a view says so
when that left some out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from policies.at_most import at_most
from sidecar.core import eligibility
from sidecar.core.enums import Why
from sidecar.core.state import Request, State

EXAMINED_MAX = 1_000
"""Requests that one view asks "why do you wait?", oldest first."""
PLACES_NAMED_MAX = 2


@dataclass(frozen=True)
class WaitingView:
    """A waiting request, its times counted from its arrival.

    It was promised its first token within `bound_ns`: None when nothing was promised, or no longer, for the reason
    `voided`. It ends as expired once it has waited for `expires_ns`.
    """

    request: int
    client_id: str
    adapter: str
    tenant: str
    klass: str
    backend: str
    waited_ns: int
    bound_ns: int | None
    voided: str
    expires_ns: int
    why: Why


@dataclass(frozen=True)
class QueueView:
    """Who waits. `why` counts the reasons of the oldest `examined` requests, most frequent first."""

    verdict: str
    waiting: int
    running: int
    requests: tuple[WaitingView, ...]
    why: tuple[tuple[Why, int], ...]
    examined: int


def queue_view(state: State, now_ns: int, adapter: str = "", backend: str = "", limit: int = 100) -> QueueView:
    """Return the queue, or the part of it that is of one adapter or on one backend.

    Lists at most `limit` requests and examines at most `EXAMINED_MAX`, oldest first.
    """
    waiting, running = _counts(state, adapter, backend)
    oldest = [
        _waiting_view(state, request, now_ns)
        for request in at_most(EXAMINED_MAX, _matching(state, adapter, backend, running=False))
    ]
    why: dict[Why, int] = {}
    for view in oldest:
        why[view.why] = why.get(view.why, 0) + 1
    return QueueView(
        verdict=_verdict(oldest, waiting, running, _silent_ns(state, now_ns)),
        waiting=waiting,
        running=running,
        requests=tuple(oldest[:limit]),
        why=tuple(sorted(why.items(), key=lambda pair: (-pair[1], pair[0].value))),
        examined=len(oldest),
    )


def reasons(state: State, now_ns: int) -> dict[Why, int]:
    """Count all that wait by why they do; each reason is there, nobody's as 0.

    At each backend the first request of a version speaks for all of that version, so that this takes as long as there
    are versions that wait, however many requests do: mostly it is the version that waits, or all wait behind the first.
    """
    counts = dict.fromkeys(Why, 0)
    counts[Why.BACKEND_DOWN] = len(state.unrouted)
    for backend in state.backends.values():
        for line in backend.queued_by_version.values():
            counts[eligibility.why_waiting(state, state.requests[line.first()], now_ns)] += len(line)
    return counts


def _counts(state: State, adapter: str, backend: str) -> tuple[int, int]:
    """Return how many wait and how many run; a walk over all requests only for one adapter's."""
    if adapter:
        waiting = sum(1 for _ in _matching(state, adapter, backend, running=False))
        return waiting, sum(1 for _ in _matching(state, adapter, backend, running=True))
    if backend:
        chosen = state.backends[backend]
        return len(chosen.queued), len(chosen.running)
    return state.queued, sum(len(each.running) for each in state.backends.values())


def _matching(state: State, adapter: str, backend: str, running: bool) -> Iterator[Request]:
    """Yield requests in the order of arrival, which is that of their dict."""
    for request in state.requests.values():
        if request.running is not running:
            continue
        if (not adapter or request.view.name == adapter) and (not backend or request.backend == backend):
            yield request


def _waiting_view(state: State, request: Request, now_ns: int) -> WaitingView:
    view = request.view
    return WaitingView(
        request=request.id,
        client_id=request.client_id,
        adapter=view.name,
        tenant=view.tenant,
        klass=view.klass,
        backend=request.backend or "",
        waited_ns=now_ns - view.arrived_ns,
        bound_ns=None if request.promise is None else request.promise.bound_ns,
        voided=request.voided,
        expires_ns=request.expires_ns - view.arrived_ns,
        why=eligibility.why_waiting(state, request, now_ns),
    )


def _silent_ns(state: State, now_ns: int) -> int:
    """Return for how long nothing has come from the backend that is suspected longest, 0 if none is."""
    return max((now_ns - b.silence.since_ns for b in state.backends.values() if b.silence.suspected), default=0)


def _verdict(oldest: list[WaitingView], waiting: int, running: int, silent_ns: int) -> str:
    if not oldest:
        return f"nobody waits, {running} running" if running else "nobody waits, nothing runs"
    first = oldest[0]
    since = f"{seconds(first.waited_ns)} ({_limits(first)})"
    places: dict[Why, list[str]] = {}
    for view in oldest:
        places.setdefault(view.why, []).append(view.backend)
    why, where = min(places.items(), key=lambda pair: (-len(pair[1]), pair[0].value))
    because = _because(why, list(dict.fromkeys(where)))
    if why is Why.STALLED:
        because += f" for {seconds(silent_ns)}"
    count = len(where)
    if waiting == 1:
        return f"1 waiting for {since} because {because}"
    share = "all" if count == waiting else str(count)
    among = "them" if len(oldest) == waiting else f"the oldest {len(oldest)}"
    return f"{waiting} waiting, the oldest for {since}, {share} of {among} because {because}"


def _limits(view: WaitingView) -> str:
    """Say what was promised and what the class or the deadline allows, once where that is the same."""
    expires = f"expires {seconds(view.expires_ns)}"
    if view.bound_ns is None:
        return f"bound void: {view.voided}, {expires}" if view.voided else expires
    bound = f"bound {seconds(view.bound_ns)}"
    return bound if view.bound_ns == view.expires_ns else f"{bound}, {expires}"


def _because(why: Why, backends: list[str]) -> str:
    """Say what a reason means on these backends; [""] is a request that could be routed to none."""
    known = [backend for backend in backends if backend]
    if why is Why.BACKEND_DOWN and known:
        return f"nothing answers on {_places(known)}"
    return why.because.format(places=_places(known))


def _places(backends: list[str]) -> str:
    return " and ".join(backends) if len(backends) <= PLACES_NAMED_MAX else f"{len(backends)} backends"


def seconds(duration_ns: int) -> str:
    """Return a duration as people read it."""
    if 0 < duration_ns < 1_000_000_000:
        return f"{duration_ns / 1e6:.0f} ms"
    seconds = duration_ns / 1e9
    return f"{seconds:.1f} s" if seconds < 100 and round(seconds, 1) % 1 else f"{seconds:.0f} s"
