"""Views of the queue for operators: which requests wait, how long, against which bound, and why.

They are read between steps and change nothing. Only the oldest requests are asked why they wait, and for each group its
oldest one; a view says when that left some out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter

from policies.at_most import at_most
from sidecar.core import eligibility
from sidecar.core.durations import readable
from sidecar.core.enums import Why, void_told
from sidecar.core.state import NEVER_NS, Request, State
from sidecar.core.troubles import NOTHING, Beyond, elsewhere, elsewhere_unnamed, idle, leaving, troubles

EXAMINED_MAX = 1_000
"""Requests of one view whose reason to wait is computed, oldest first."""
EXAMINED_OFTEN_MAX = 100
"""The same for a verdict that is made every second."""
PLACES_NAMED_MAX = 2
FLOOD_MIN = 10
HOLDER_MIN = 4
FLOOD_SHARE = 0.8
"""The verdict names an adapter or a tenant that has this share of so many waiting requests."""


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
class GroupView:
    """The requests of one adapter and tenant at one backend; `backend` is "" for those that no backend can take.

    `tokens` is what the waiting ones ask for, prompts included. `oldest` is the waiting one that arrived first, None if
    all run.
    """

    adapter: str
    tenant: str
    backend: str
    waiting: int
    running: int
    tokens: int
    oldest: WaitingView | None


@dataclass(frozen=True)
class QueueView:
    """The queue. `why` counts the reasons of the oldest `examined` requests, most frequent first.

    `groups` holds at most as many as asked for, of `groups_total`: those that wait come first, the longest wait first,
    then those that only run, the largest first.
    """

    verdict: str
    waiting: int
    running: int
    requests: tuple[WaitingView, ...]
    why: tuple[tuple[Why, int], ...]
    examined: int
    groups: tuple[GroupView, ...]
    groups_total: int


def queue_view(
    state: State,
    now_ns: int,
    adapter: str = "",
    backend: str = "",
    limit: int = 100,
    tenant: str | None = None,
    beyond: Beyond = NOTHING,
) -> QueueView:
    """Return the queue, or the part of it for one adapter, backend or tenant.

    Lists at most `limit` requests and groups, and examines at most `EXAMINED_MAX` requests, oldest first. The verdict
    begins with what is wrong with the pool, unless the view is confined to a tenant.
    """
    groups = groups_of(state, adapter, backend, tenant)
    oldest = _oldest(state, now_ns, EXAMINED_MAX, adapter, backend, tenant)
    why: dict[Why, int] = {}
    for view in oldest:
        why[view.why] = why.get(view.why, 0) + 1
    groups.sort(key=Group.place)
    return QueueView(
        verdict=_told(state, now_ns, groups, oldest, tenant, beyond),
        waiting=sum(group.waiting for group in groups),
        running=sum(group.running for group in groups),
        requests=tuple(oldest[:limit]),
        why=tuple(sorted(why.items(), key=lambda pair: (-pair[1], pair[0].value))),
        examined=len(oldest),
        groups=tuple(group.view(state, now_ns) for group in groups[:limit]),
        groups_total=len(groups),
    )


def verdict(state: State, now_ns: int, groups: list[Group], tenant: str | None, beyond: Beyond) -> str:
    """Return the verdict of `queue_view` for groups that are known; it looks at fewer requests."""
    oldest = _oldest(state, now_ns, EXAMINED_OFTEN_MAX, "", "", tenant)
    return _told(state, now_ns, groups, oldest, tenant, beyond)


def _oldest(state: State, now_ns: int, most: int, adapter: str, backend: str, tenant: str | None) -> list[WaitingView]:
    oldest = at_most(most, _matching(state, adapter, backend, tenant, running=False))
    return [waiting_view(state, request, now_ns) for request in oldest]


def _told(
    state: State, now_ns: int, groups: list[Group], oldest: list[WaitingView], tenant: str | None, beyond: Beyond
) -> str:
    """Return the verdict. Who is confined to a tenant hears nothing of the pool."""
    waiting = sum(group.waiting for group in groups)
    running = sum(group.running for group in groups)
    holders = [] if tenant is not None else groups
    of_queue = _verdict(state, now_ns, oldest, waiting, running, _flood(groups, waiting), holders, beyond)
    if beyond.passed_on and not oldest:
        of_queue = of_queue.replace("nobody waits", "nobody waits here", 1)
    if tenant is not None:
        return "; ".join((*elsewhere_unnamed(beyond), of_queue))
    longest = min((group.oldest for group in groups if group.oldest is not None), key=lambda r: r.id, default=None)
    empty = idle(state, longest) if longest is not None else ()
    return "; ".join((*troubles(state, now_ns, beyond), *elsewhere(beyond), of_queue, *empty))


@dataclass
class Group:
    """The requests of one group, counted."""

    adapter: str
    tenant: str
    backend: str
    waiting: int = 0
    running: int = 0
    tokens: int = 0
    oldest: Request | None = None

    def place(self) -> tuple[int, int, str, str, str]:
        """Return what groups are sorted by. Requests are numbered in order of arrival."""
        first = NEVER_NS if self.oldest is None else self.oldest.id
        return first, -self.running, self.adapter, self.tenant, self.backend

    def view(self, state: State, now_ns: int) -> GroupView:
        oldest = None if self.oldest is None else waiting_view(state, self.oldest, now_ns)
        return GroupView(self.adapter, self.tenant, self.backend, self.waiting, self.running, self.tokens, oldest)


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


def _matching(
    state: State, adapter: str, backend: str, tenant: str | None, running: bool | None = None
) -> Iterator[Request]:
    """Yield requests in order of arrival, which is the order of their dict."""
    for request in state.requests.values():
        if running is not None and request.running is not running:
            continue
        if tenant is not None and request.view.tenant != tenant:
            continue
        if (not adapter or request.view.name == adapter) and (not backend or request.backend == backend):
            yield request


def groups_of(state: State, adapter: str = "", backend: str = "", tenant: str | None = None) -> list[Group]:
    groups: Groups = {}
    add_to_groups(groups, _matching(state, adapter, backend, tenant))
    return list(groups.values())


Groups = dict[tuple[str, str, str], Group]
"""By the name of the adapter, the tenant, and the backend."""


def add_to_groups(groups: Groups, requests: Iterable[Request]) -> None:
    """Count requests, which come in order of arrival, but not those that have ended meanwhile."""
    for request in requests:
        if request.settled:
            continue
        view = request.view
        key = view.name, view.tenant, request.backend or ""
        group = groups.get(key)
        if group is None:
            group = groups[key] = Group(*key)
        if request.running:
            group.running += 1
            continue
        group.waiting += 1
        group.tokens += view.input_tokens + view.output_tokens_max
        if group.oldest is None:
            group.oldest = request


def _flood(groups: list[Group], waiting: int) -> str:
    """Return whose most of a long queue is: ", 58 of them for sql of tenant acme"; "" if it is nobody's."""
    if waiting < FLOOD_MIN:
        return ""
    adapters: Counter[str] = Counter()
    tenants: Counter[str] = Counter()
    for group in groups:
        adapters[group.adapter] += group.waiting
        tenants[group.tenant] += group.waiting
    del tenants[""]
    parts, counts = [], []
    for named, whose in ((adapters, "for {}"), (tenants, "of tenant {}")):
        name, count = max(named.items(), key=itemgetter(1), default=("", 0))
        if count >= FLOOD_SHARE * waiting:
            parts.append(whose.format(name or "the base model"))
            counts.append(count)
    return f", {'all' if min(counts) == waiting else min(counts)} of them {' '.join(parts)}" if parts else ""


def _holder(state: State, groups: list[Group], places: Collection[str], whose: str) -> str:
    """Return who has most seats of some backends: ", 8 of 8 by tenant acme"; "" if nobody, or who floods the queue."""
    there = [group for group in groups if group.backend in places]
    taken = sum(group.running for group in there)
    if taken < HOLDER_MIN or taken < sum(len(state.backends[place].running) for place in places):
        return ""  # or only a part of the requests is looked at
    tenants: Counter[str] = Counter()
    for group in there:
        tenants[group.tenant] += group.running
    name, count = max(tenants.items(), key=itemgetter(1))
    is_told = not name or count < FLOOD_SHARE * taken or f"of tenant {name}" in whose
    return "" if is_told else f", {count} of {taken} by tenant {name}"


def waiting_view(state: State, request: Request, now_ns: int) -> WaitingView:
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


def _verdict(
    state: State,
    now_ns: int,
    oldest: list[WaitingView],
    waiting: int,
    running: int,
    whose: str,
    holders: list[Group],
    beyond: Beyond,
) -> str:
    if not oldest:
        return f"nobody waits, {running} running" if running else "nobody waits, nothing runs"
    first = oldest[0]
    since = f"{readable(first.waited_ns)} ({_limits(first)})"
    by_reason: dict[Why, list[WaitingView]] = {}
    for view in oldest:
        by_reason.setdefault(view.why, []).append(view)
    why, views = min(by_reason.items(), key=lambda pair: (-len(pair[1]), pair[0].value))
    because = _because(why, views)
    if why is Why.STALLED:
        because += f" for {readable(_silent_ns(state, now_ns))}"
    elif why is Why.BACKEND_DOWN and not any(view.backend for view in views):
        because = leaving(state, state.requests[views[0].request], beyond) or because
    elif why is Why.SEATS_FULL:
        because += _holder(state, holders, {view.backend for view in views}, whose)
    count = len(views)
    if waiting == 1:
        return f"1 waiting for {since} because {because}"
    share = "all" if count == waiting else str(count)
    among = "them" if len(oldest) == waiting else f"the oldest {len(oldest)}"
    return f"{waiting} waiting{whose}, the oldest for {since}, {share} of {among} because {because}"


def _limits(view: WaitingView) -> str:
    """Return what was promised and when the request expires; once if both are the same."""
    expires = f"expires {readable(view.expires_ns)}"
    if view.bound_ns is None:
        return f"bound void: {void_told(view.voided)}, {expires}" if view.voided else expires
    bound = f"bound {readable(view.bound_ns)}"
    return bound if view.bound_ns == view.expires_ns else f"{bound}, {expires}"


def _because(why: Why, views: list[WaitingView]) -> str:
    """Return a reason as a clause about the backends and adapters of the requests for which it holds."""
    backends = list(dict.fromkeys(view.backend for view in views if view.backend))
    if why is Why.BACKEND_DOWN and backends:
        return f"nothing answers on {_joined(backends, 'backends')}"
    adapters = list(dict.fromkeys(view.adapter or "the base model" for view in views))
    return why.because.format(places=_joined(backends, "backends"), names=_joined(adapters, "adapters"))


def _joined(names: list[str], what: str) -> str:
    return " and ".join(names) if len(names) <= PLACES_NAMED_MAX else f"{len(names)} {what}"
