"""Views of the queue for operators: which requests wait, how long, against which bound, and why.

They are read between steps and change nothing. Counting is cheap for any queue length; only the oldest requests are
asked why they wait, and a view says when that left some out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from policies.at_most import at_most
from sidecar.core import eligibility
from sidecar.core.enums import Why
from sidecar.core.state import Request, State

EXAMINED_MAX = 1_000
"""Requests of one view whose reason to wait is computed, oldest first."""
PLACES_NAMED_MAX = 2


@dataclass(frozen=True)
class WaitingView:
    """A waiting request. Its times count from its arrival.

    Its promise is a first token within `bound_ns`; None if nothing was promised or the promise is void, for the reason
    `voided`. It expires once it has waited for `expires_ns`.
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
    """The queue. `why` counts the reasons of the oldest `examined` requests, most frequent first."""

    verdict: str
    waiting: int
    running: int
    requests: tuple[WaitingView, ...]
    why: tuple[tuple[Why, int], ...]
    examined: int


def queue_view(
    state: State, now_ns: int, adapter: str = "", backend: str = "", limit: int = 100, tenant: str | None = None
) -> QueueView:
    """Return the queue, or the part of it for one adapter, backend or tenant.

    Lists at most `limit` requests and examines at most `EXAMINED_MAX`, oldest first.
    """
    waiting, running = _counts(state, adapter, backend, tenant)
    oldest = [
        _waiting_view(state, request, now_ns)
        for request in at_most(EXAMINED_MAX, _matching(state, adapter, backend, tenant, running=False))
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
    """Count all waiting requests by reason; every reason is a key.

    At each backend the first request of a version stands for all of that version, so the cost grows with the number of
    waiting versions and not of requests. Mostly it is the version that waits, or all wait behind the first.
    """
    counts = dict.fromkeys(Why, 0)
    counts[Why.BACKEND_DOWN] = len(state.unrouted)
    for backend in state.backends.values():
        for queue in backend.queued_by_version.values():
            counts[eligibility.why_waiting(state, state.requests[queue.first()], now_ns)] += len(queue)
    return counts


def _counts(state: State, adapter: str, backend: str, tenant: str | None) -> tuple[int, int]:
    """Return how many requests wait and run. Only the counts for one adapter or tenant walk over all requests."""
    if adapter or tenant is not None:
        waiting = sum(1 for _ in _matching(state, adapter, backend, tenant, running=False))
        return waiting, sum(1 for _ in _matching(state, adapter, backend, tenant, running=True))
    if backend:
        chosen = state.backends[backend]
        return len(chosen.queued), len(chosen.running)
    return state.queued, sum(len(each.running) for each in state.backends.values())


def _matching(state: State, adapter: str, backend: str, tenant: str | None, running: bool) -> Iterator[Request]:
    """Yield requests in order of arrival, which is the order of their dict."""
    for request in state.requests.values():
        if request.running is not running:
            continue
        if tenant is not None and request.view.tenant != tenant:
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
    """Return how long nothing has come from the backend that has been suspected longest; 0 if none is."""
    return max((now_ns - b.silence.since_ns for b in state.backends.values() if b.silence.suspected), default=0)


def _verdict(oldest: list[WaitingView], waiting: int, running: int, silent_ns: int) -> str:
    if not oldest:
        return f"nobody waits, {running} running" if running else "nobody waits, nothing runs"
    first = oldest[0]
    since = f"{seconds(first.waited_ns)} ({_limits(first)})"
    backends: dict[Why, list[str]] = {}
    for view in oldest:
        backends.setdefault(view.why, []).append(view.backend)
    why, where = min(backends.items(), key=lambda pair: (-len(pair[1]), pair[0].value))
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
    """Return what was promised and when the request expires; once if both are the same."""
    expires = f"expires {seconds(view.expires_ns)}"
    if view.bound_ns is None:
        return f"bound void: {view.voided}, {expires}" if view.voided else expires
    bound = f"bound {seconds(view.bound_ns)}"
    return bound if view.bound_ns == view.expires_ns else f"{bound}, {expires}"


def _because(why: Why, backends: list[str]) -> str:
    """Return a reason as a clause about these backends; [""] stands for a request without a backend."""
    known = [backend for backend in backends if backend]
    if why is Why.BACKEND_DOWN and known:
        return f"nothing answers on {_joined(known)}"
    return why.because.format(places=_joined(known))


def _joined(backends: list[str]) -> str:
    return " and ".join(backends) if len(backends) <= PLACES_NAMED_MAX else f"{len(backends)} backends"


def seconds(duration_ns: int) -> str:
    """Return a duration for people: "250 ms", "1.5 s", "120 s"."""
    if 0 < duration_ns < 1_000_000_000:
        return f"{duration_ns / 1e6:.0f} ms"
    seconds = duration_ns / 1e9
    return f"{seconds:.1f} s" if seconds < 100 and round(seconds, 1) % 1 else f"{seconds:.0f} s"
