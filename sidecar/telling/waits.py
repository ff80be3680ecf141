"""Why a request waits, and why its promise is void, in words: a clause for all that wait, a sentence for one of them.

Call these functions between steps; they change nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from operator import itemgetter

from policies.views import BASE
from sidecar.core import eligibility
from sidecar.core.eligibility import Why
from sidecar.core.enums import Phase, Voided
from sidecar.core.misfits import Drained, Draining
from sidecar.core.state import Backend, Request, State
from sidecar.telling.durations import readable
from sidecar.telling.misfits import label
from sidecar.telling.naming import called

NAMED_MAX = 6
"""The most adapters or backends that a sentence names; it counts the rest."""

FLOOD_MIN, HOLDER_MIN, FLOOD_SHARE = 10, 4, 0.8
"""A tenant, or an adapter, is named that has this share of so many waiting requests, or of so many that run."""

CONTENDED = (Why.SLOTS_BUSY, Why.SEATS_FULL, Why.KV_FULL, Why.GATED, Why.TENANT_CAP, Why.NEXT)
"""The reasons that other requests are."""


def because(why: Why, backends: str, adapters: str) -> str:
    """Return a reason to wait as a clause about the backends and the adapters for which it holds."""
    return _PHRASES[why][0].format(places=backends, names=adapters)


def in_the_way(state: State, request: Request, why: Why, now_ns: int) -> str:
    """Return what keeps a waiting request from running; `why` is the result of `eligibility.why_waiting`."""
    if request.backend is None:
        return _no_backend(state, request)
    backend = state.backends[request.backend]
    return _PHRASES[why][1](state, backend, request, now_ns) + (
        _flood(state, backend, request) if why in CONTENDED else ""
    )


def _flood(state: State, backend: Backend, request: Request) -> str:
    """Return which other tenant has most of what runs there, or of what waits; "" if none."""
    running = Counter(state.requests[each].view.tenant for each in backend.running)
    waiting = {tenant: queued.requests for tenant, queued in state.tenant_queued.items()}
    told = []
    for counts, least, what in ((running, HOLDER_MIN, f"run on {backend.id}"), (waiting, FLOOD_MIN, "wait")):
        tenant, count = max(counts.items(), key=itemgetter(1), default=("", 0))
        if tenant not in ("", request.view.tenant) and count >= max(least, FLOOD_SHARE * sum(counts.values())):
            told.append(f'; {count} of {sum(counts.values())} that {what} are of tenant "{tenant}"')
    return "".join(told)


def listed(names: Iterable[str], most: int = NAMED_MAX) -> str:
    """Return "a, b, c and 4 more"."""
    held = list(names)
    more = len(held) - most
    return ", ".join(held) if more <= 0 else f"{', '.join(held[:most])} and {more} more"


def _no_backend(state: State, request: Request) -> str:
    return listed(f"{backend.id} {_why_not_there(state, backend, request)}" for backend in state.backends.values())


def _why_not_there(state: State, backend: Backend, request: Request) -> str:
    unfit = eligibility.cannot_serve(state, backend, request.version)
    if unfit is not None:
        return f"is {label(unfit)}" if isinstance(unfit, Draining | Drained) else f"does not fit ({label(unfit)})"
    if backend.phase is Phase.DOWN:
        return "is down"
    if backend.leaving:
        return "is leaving"
    if not backend.owned:
        return "is another replica's"
    if backend not in eligibility.among((backend,), request.only):
        return "is not among those that the request may go to"
    if not eligibility.long_enough(backend, request.view.input_tokens):
        return "takes no prompt of this length"
    return f"has no seats for {request.view.sequences} sequences at once"


def _down(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    return f"{backend.id} is down"


def _stalled(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    found = f" ({backend.silence.found})" if backend.silence.found else ""
    return f"nothing came from {backend.id} for {readable(now_ns - backend.silence.since_ns)}{found}"


def _backing_off(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    pause = readable(backend.quiet_until_ns - now_ns)
    return f"{backend.id} refused work or broke a wire, so for {pause} nothing is sent there"


def _fetching(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    key = state.packed_for(request.version, backend).key
    if state.store.fetching(key):
        return "its weights are on their way into the host store"
    return f"{state.store.fetches} fetches of others are under way, as many as store.fetches_max allows"


def _store_full(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    store = state.store
    needed_bytes = state.packed_for(request.version, backend).size_bytes
    return (
        f"it needs {needed_bytes} bytes; {store.bytes_used} of {store.budget_bytes} are taken, and what is there is in "
        "use or wanted sooner"
    )


def _loading(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    load = state.loads.get(state.versions[request.version].loads.get(backend.id, 0))
    if load is None:
        return f"{backend.id} lost it while others of it still run: it is to be loaded again"
    return f"load {load.id} into {backend.id}, begun {readable(now_ns - load.begun_ns)} before"


def _host_cache_full(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    pause = readable(backend.full_until_ns - now_ns)
    return f"{backend.id} said so; loads wait for a completion there, or for {pause}"


def _slots_busy(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    busy = {version: slot for version, slot in backend.slots.items() if backend.slot_busy(version, slot)}
    taken, limit = sum(slot.pages for slot in busy.values()), eligibility.page_limit(backend)
    holders = listed(_holder(state, backend, version) for version in busy)
    needed = state.packed_for(request.version, backend).pages
    return f"it needs {_pages(needed)}; {taken} of {limit} are held by {holders}"


def _pages(count: int) -> str:
    return "1 page" if count == 1 else f"{count} pages"


def _holder(state: State, backend: Backend, version: str) -> str:
    slot, waiting = backend.slots[version], len(backend.queued_by_version.get(version, ()))
    parts = [f"{slot.running} running"] if slot.running else []
    parts += ["loading"] if slot.load is not None else []
    parts += [f"{waiting} waiting"] if waiting else []
    return f"{called(state, version, backend)} ({', '.join(parts)})"


def _seats_full(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    counts: dict[str, int] = {}
    for running in backend.running:
        view = state.requests[running].view
        counts[view.name or "base model"] = counts.get(view.name or "base model", 0) + view.sequences
    takers = [f"{name} {count}" for name, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]
    takers += [f"loads {len(backend.loads)}"] if backend.loads else []
    return f"{backend.in_flight} of {backend.seats(state.config)} seats are taken: {listed(takers)}"


def _kv_full(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    return (
        f"it may need {request.kv_tokens(backend)} KV tokens; {backend.kv_reserved} of {backend.facts.kv_tokens} are "
        f"reserved by {len(backend.running)} running"
    )


def _probation(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    places = [place for place in state.versions[request.version].loads if place != backend.id]
    return f"its version has not answered anywhere yet and is being loaded on {listed(places)}"


def _apart(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    if backend.lone_load is not None:
        load = state.loads.get(backend.lone_load)
        what = called(state, load.digest, backend) if load is not None else "a suspect"
        return f"{what}, in whose load an engine failed, is being loaded alone on {backend.id}"
    if request.version != BASE and state.versions[request.version].suspect:
        return f"an engine failed in its load, so it is loaded alone, once nothing else is loading on {backend.id}"
    suspects = [called(state, digest, backend) for digest in state.suspects if digest in backend.queued_by_version]
    return f"{listed(suspects) or 'a suspect'}, in whose load an engine failed, is to be loaded alone first"


def _gated(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    holders = listed(_holder(state, backend, version) for version in backend.slots)
    return f"the {state.config.ordering} policy serves {holders or 'others'} first"


def _tenant_cap(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    tenant = request.view.tenant
    running = sum(state.requests[other].view.tenant == tenant for other in backend.running)
    return f'tenant "{tenant}" has {running} running there'


def _next(state: State, backend: Backend, request: Request, now_ns: int) -> str:
    return "it can be sent now; the ordering policy chose another request first"


_Sentence = Callable[[State, Backend, Request, int], str]
_PHRASES: dict[Why, tuple[str, _Sentence]] = {
    Why.BACKEND_DOWN: ("every engine that could serve is down or drained", _down),
    Why.STALLED: ("nothing comes from {places}", _stalled),
    Why.BACKING_OFF: ("a pause is kept after a refusal by {places}", _backing_off),
    Why.FETCHING: ("weights of {names} are being fetched", _fetching),
    Why.STORE_FULL: ("the host store has no room for {names}", _store_full),
    Why.LOADING: ("weights of {names} are being loaded on {places}", _loading),
    Why.HOST_CACHE_FULL: ("the adapter host cache of {places} is full", _host_cache_full),
    Why.SLOTS_BUSY: ("all slots are busy on {places}", _slots_busy),
    Why.SEATS_FULL: ("all seats are taken on {places}", _seats_full),
    Why.KV_FULL: ("the KV cache is full on {places}", _kv_full),
    Why.PROBATION: ("a first load of {names} is under way elsewhere", _probation),
    Why.APART: ("a suspect load of {names} on {places} is kept apart", _apart),
    Why.GATED: ("the ordering policy holds back on {places}", _gated),
    Why.TENANT_CAP: ("a tenant has its share of {places}", _tenant_cap),
    Why.NEXT: ("the ordering policy chose others first on {places}", _next),
}
"""By reason: the clause of all that wait for it, and what makes the sentence of one."""


def void_label(voided: Voided | None) -> str:
    """Return why a promise is void, as views tell it; journals and metrics have the plain label. "" if it holds."""
    return "backend slower than assumed" if voided is Voided.BACKEND_SLOWED else "" if voided is None else voided.value


VOID_BECAUSE = {
    Voided.ADAPTER_LATE: "The adapter's weights came later than assumed.",
    Voided.ANSWERS_LONGER: "Answers are now longer than those from which the bound was computed.",
    Voided.BACKEND_ADDED: "A backend was added, and the host store no longer holds an adapter for every slot.",
    Voided.BACKEND_LOST: "The engine was lost.",
    Voided.BACKEND_SLOWED: (
        "The engine's steps take longer than the bound assumed: *backend slower than assumed* in `sidecar queue` and "
        "`sidecar top`. Until a pace is calibrated or learned it is a guess, so a first burst may show this although "
        "nothing is wrong; later bounds rest on what was measured."
    ),
    Voided.BACKEND_STALLED: "Nothing came from the engine for a while.",
    Voided.ENGINE_QUEUE_FULL: "The engine refused a request because its own queue was full.",
    Voided.KEPT_APART: "The engine can't run base and adapter requests in one batch, and both kinds came.",
    Voided.MOVED: "The request was moved to another backend.",
    Voided.NO_BACKEND: "No backend that could serve was up.",
    Voided.RUN_AGAIN: "The request was sent and had to be sent again.",
    Voided.SHARES_CHANGED: "Tenants' weights were changed.",
    Voided.UNTOLD: (
        "A proxy carried an answer whose end was never reported, so it kept its seat until the sidecar asked the "
        "engine. Or the engine got requests that this process did not send."
    ),
}
