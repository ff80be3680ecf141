"""Questions that change nothing. The acts assert the same answers, so "who would go" and "go" cannot disagree."""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from policies.views import BASE, Hold, Waiting
from sidecar.core.enums import Phase, Why
from sidecar.core.facts import Misfit, misfit
from sidecar.core.state import NEVER_NS, Backend, Request, State, Version


def cannot_serve(state: State, backend: Backend, digest: str) -> Misfit | None:
    """Say why a backend can never serve a version as things are configured, drained or learned; None if it can."""
    if backend.draining:
        return Misfit("draining", "it is draining")
    if digest == BASE:
        return None
    version = state.versions[digest]
    refused = version.refused_by.get(backend.id)
    if refused is not None:
        return Misfit("rejected the load", f"its engine rejected the load: {refused}")
    packed = state.packed_for(digest, backend)
    if packed.size_bytes > state.config.store_bytes:
        return Misfit(
            "larger than the host store",
            f"packed it takes {packed.size_bytes} bytes and the host store holds {state.config.store_bytes}; "
            "raise store.memory_bytes",
        )
    return state.misfit_of(digest, backend)


def servers_of(state: State, digest: str) -> tuple[Backend, ...]:
    """Return the backends that can serve a version, up or down, in the order they were configured."""
    servers = state.servers.get(digest)
    if servers is None:
        servers = tuple(b for b in state.backends.values() if cannot_serve(state, b, digest) is None)
        state.servers[digest] = servers
    return servers


def places_of(state: State, request: Request) -> tuple[Backend, ...]:
    """Return the backends that can serve a request and that it may go to, up or down."""
    servers = among(servers_of(state, request.version), request.only)
    return tuple(server for server in servers if server.can_seat(request.view.sequences, state.config))


def among(servers: tuple[Backend, ...], only: tuple[str, ...]) -> tuple[Backend, ...]:
    """Return those of some backends that a request may go to: `only` names backends, and pools that they are of."""
    return servers if not only else tuple(server for server in servers if _is_among(server, only))


def _is_among(backend: Backend, only: tuple[str, ...]) -> bool:
    return backend.id in only or backend.group in only


def takers_of(state: State, digest: str, request: Waiting, only: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the backends that are up, can serve a version, take a prompt of this length and are among `only`.

    They have seats for as many sequences, too. One that joins is among them only if there is no other, and one that is
    suspected to be stalled only if there is none at all.
    """
    takers = state.takers.get(digest)
    if takers is None:
        up = [backend for backend in servers_of(state, digest) if backend.takes_requests]
        longest = min((backend.facts.input_tokens_max or NEVER_NS for backend in up), default=0)
        takers = state.takers[digest] = (tuple(backend.id for backend in up), longest)
    ids, longest = takers
    if only:
        ids = tuple(backend for backend in ids if _is_among(state.backends[backend], only))
    if request.input_tokens > longest:
        ids = tuple(backend for backend in ids if long_enough(state.backends[backend], request.input_tokens))
    if request.sequences > 1:
        ids = tuple(backend for backend in ids if state.backends[backend].can_seat(request.sequences, state.config))
    if not ids:
        return _stalled(state, digest, request, only)
    if not state.joining:
        return ids
    return tuple(backend for backend in ids if backend not in state.joining) or ids


def _stalled(state: State, digest: str, request: Waiting, only: tuple[str, ...]) -> tuple[str, ...]:
    """Return those that would take a request if they were not suspected: it waits there rather than nowhere."""
    return tuple(
        backend.id
        for backend in among(servers_of(state, digest), only)
        if backend.serves
        and long_enough(backend, request.input_tokens)
        and backend.can_seat(request.sequences, state.config)
    )


def are_gone(state: State, only: tuple[str, ...]) -> bool:
    """Whether all the backends that a request is held to are not there, or not any more; a pool stays."""
    known = any(_is_among(backend, only) for backend in state.backends.values())
    return bool(only) and not known and not any(name in state.config.pools for name in only)


def gone_message(only: tuple[str, ...]) -> str:
    return f"{', '.join(only)}: not known here, or not any more; send the request again"


def may_come(state: State, digest: str, only: tuple[str, ...]) -> bool:
    """Whether a backend that can serve a version may still be found: in a pool that is empty at the moment."""
    filled = {backend.pool for backend in state.backends.values()}
    return any(
        pool not in filled
        and (not only or pool in only)
        and (digest == BASE or misfit(state.versions[digest].adapter, facts) is None)
        for pool, facts in state.config.pools.items()
    )


def long_enough(backend: Backend, input_tokens: int) -> bool:
    """Whether the engine takes a prompt of this length."""
    longest = backend.facts.input_tokens_max
    return longest is None or input_tokens <= longest


def no_backend_message(state: State, name: str, digest: str) -> str:
    """Say that no backend can serve an adapter, counting the reasons: "5 max rank 32 < 64, 2 other base"."""
    counts: dict[str, int] = {}
    sentence = ""
    for backend in state.backends.values():
        unfit = cannot_serve(state, backend, digest)
        if unfit is not None:
            counts[unfit.short] = counts.get(unfit.short, 0) + 1
            sentence = sentence or f" {backend.id}: {unfit.sentence}."
    total = len(state.backends)
    if total and not counts:
        return f'{name}: no backend that the request may go to is configured; "sidecar backends list" shows them'
    if not total and state.config.pools:
        return f"{name}: no engine has been found yet, and none of {', '.join(state.config.pools)} could serve it"
    if not total:
        return f"{name}: no backend is configured; start the sidecar with --backend triton://HOST:PORT"
    reasons = ", ".join(f"{count} {short}" for short, count in counts.items())
    return f"{name}: 0 of {total} backends can serve it: {reasons}.{sentence}"


def not_owner_message(places: tuple[Backend, ...]) -> str:
    """Say that all backends that a request may go to are other replicas'."""
    return f"{', '.join(place.id for place in places)}: another replica's; send the request there"


def resident(backend: Backend, digest: str) -> bool:
    """Whether the version is believed to be in the engine, so that its id alone is enough."""
    return digest == BASE or digest in backend.shadow.host


def ready(state: State, backend: Backend, digest: str) -> bool:
    """Whether a version can be opened without a fetch: the cheapest question, so it is asked first."""
    return digest in backend.shadow.host.held or state.store.has(state.packed_for(digest, backend).key)


def awaits_fetch(state: State, key: str) -> bool:
    """Whether a blob that is not in the store is on its way, or behind others; else there is no room for it."""
    return state.store.fetches >= state.config.fetches_max or state.store.fetching(key)


def is_needed(state: State, key: str) -> bool:
    """Whether requests wait for a blob, which some do, at a backend whose engine has not got it."""
    first = state.wanted[key].head()
    assert first is not None
    digest = state.requests[first].version
    return any(
        digest in backend.queued_by_version
        and state.packed_for(digest, backend).key == key
        and not resident(backend, digest)
        for backend in state.backends.values()
    )


@dataclass(frozen=True, slots=True)
class PageRoom:
    """The pages that versions yet to be opened may take, idle slots counted as free; `free` None without a limit."""

    free: int | None
    nothing_busy: bool

    def takes(self, pages: int) -> bool:
        """Whether pages fit beside what is busy. An adapter larger than the limit may run alone."""
        return self.free is None or pages <= self.free or self.nothing_busy


def page_room(backend: Backend) -> PageRoom:
    limit = page_limit(backend)
    return PageRoom(None if limit is None else limit - backend.busy_pages, not backend.busy)


def page_limit(backend: Backend) -> int | None:
    """Return the pages of versions that may be meant to run at once.

    Device pages where they are known, else what has been learned; never more than the host pages: past those the
    engine fails requests. And never more than it was seen to hold.
    """
    believed = believed_page_limit(backend)
    return believed if backend.pages_learned is None else min(believed, backend.pages_learned)


def believed_page_limit(backend: Backend) -> int:
    """Return the limit by the facts, or by what the device's answers have taught, engine misses aside."""
    device, host = backend.facts.device_pages, backend.facts.host_pages_total
    if device is None and backend.facts.attaches:  # there is no Load to learn from
        return NEVER_NS if host is None else host
    if device is None:
        device = backend.estimate.pages
    return device if host is None else min(device, host)


def why_not_open(state: State, backend: Backend, digest: str, now_ns: int, room: PageRoom | None = None) -> Why | None:
    """Say what keeps a version from being opened on a backend now, or None. `room`, when known, saves counting."""
    blocked = _blocked(backend, now_ns)
    if blocked is not None:
        return blocked
    packed = state.packed_for(digest, backend)
    if not (room or page_room(backend)).takes(packed.pages):
        return Why.SLOTS_BUSY
    if resident(backend, digest):
        return None
    return _why_not_here(state, packed.key) or why_not_load(state, backend, state.versions[digest], now_ns)


def _why_not_here(state: State, key: str) -> Why | None:
    """Say why a blob is not in the store, or None if it is."""
    if state.store.has(key):
        return None
    return Why.FETCHING if awaits_fetch(state, key) else Why.STORE_FULL


def why_not_load(state: State, backend: Backend, version: Version, now_ns: int) -> Why | None:
    """Say what keeps a version that the store holds from being loaded, slots aside, or None."""
    blocked = _blocked(backend, now_ns)
    if blocked is not None:
        return blocked
    if backend.in_flight >= backend.seats(state.config):
        return Why.SEATS_FULL
    if now_ns < backend.full_until_ns:
        return Why.HOST_CACHE_FULL
    if on_probation_elsewhere(state, backend, version):
        return Why.PROBATION
    if backend.lone_load is not None:
        return Why.APART
    if version.suspect:
        return Why.APART if backend.loads or _shelters_the_lost(state, backend) else None
    return Why.APART if _suspect_is_next(state, backend) else None


def loaded_elsewhere(state: State, backend: Backend, version: Version) -> bool:
    """Whether a Load under way elsewhere is worth waiting for. One at an engine that stalls is not; two are: then the
    version may be what the engines stall on.
    """
    places = [state.backends[place] for place in version.loads if place != backend.id]
    return len(places) > 1 or any(not place.silence.found for place in places)


def on_probation_elsewhere(state: State, backend: Backend, version: Version) -> bool:
    """Whether a version is being loaded for the first time elsewhere, so that it may not be here yet."""
    return not version.answered and loaded_elsewhere(state, backend, version)


def _suspect_is_next(state: State, backend: Backend) -> bool:
    """Whether a suspect waits only for the Loads under way to end: more of them would keep it waiting for ever."""
    for digest in state.suspects:
        if digest not in backend.queued_by_version or state.versions[digest].loads:
            continue
        packed = state.packed_for(digest, backend)
        if backend.loads and state.store.has(packed.key) and page_room(backend).takes(packed.pages):
            return True
    return False


def _shelters_the_lost(state: State, backend: Backend) -> bool:
    """Whether tokenless requests run here that lost a backend before: one more loss would end them."""
    return any(request.losses and not request.first_token for request in (state.requests[i] for i in backend.running))


def why_not_send(state: State, backend: Backend, request: Request, now_ns: int) -> Why | None:
    """Say what keeps a queued request from being dispatched now, or None."""
    blocked = _blocked(backend, now_ns)
    if blocked is not None:
        return blocked
    if request.version != BASE:
        slot = backend.slots.get(request.version)
        if slot is None:
            return why_not_open(state, backend, request.version, now_ns) or Why.NEXT
        if slot.loading:
            return Why.LOADING
        if backend.facts.attaches and (why := _why_not_here(state, state.packed_for(request.version, backend).key)):
            return why
    return _why_no_room(state, backend, request)


def why_not_take_over(state: State, backend: Backend, request: Request, now_ns: int) -> Why | None:
    """Say what keeps a request that waits elsewhere from being dispatched here now, its version opened, or None."""
    why = why_not_send(state, backend, request, now_ns)
    return _why_no_room(state, backend, request) if why is Why.NEXT else why


def _why_no_room(state: State, backend: Backend, request: Request) -> Why | None:
    """Say what keeps a request from being dispatched whose version is open, or None."""
    if not _finds_seats(state, backend, request):
        return Why.SEATS_FULL
    free = backend.kv_free
    if free is not None and backend.running and request.kv_tokens(backend) > free:
        return Why.KV_FULL
    if backend.lone_load is not None and request.losses:
        return Why.APART
    if backend.facts.base_apart and _others_among(state, backend.running, request):
        return Why.APART  # whose turn it is when they have ended is for the policy to say, as ever
    return None


def _finds_seats(state: State, backend: Backend, request: Request) -> bool:
    """Whether all sequences of a request find seats. One that fits no more, as seats went, may still run alone."""
    seats, in_flight = backend.seats(state.config), backend.in_flight
    return in_flight + request.view.sequences <= seats or (in_flight == 0 and seats > 0)


def others_of(state: State, backend: Backend, request: Request) -> set[int]:
    """Return what waits or runs at a backend and is of the other side: adapters for a base request, and vice versa."""
    return _others_among(state, (*backend.queued, *backend.running), request)


def _others_among(state: State, requests: Iterable[int], request: Request) -> set[int]:
    is_base = request.version == BASE
    return {other for other in requests if (state.requests[other].version == BASE) is not is_base}


def why_waiting(state: State, request: Request, now_ns: int) -> Why:
    """Say why a queued request is not running."""
    if request.backend is None:
        return Why.BACKEND_DOWN
    backend = state.backends[request.backend]
    why = why_not_send(state, backend, request, now_ns)
    if why is not None:
        return why
    hold = backend.ordering.holds(request.id)
    return Why.NEXT if hold is None else _HOLDS[hold]


_HOLDS = {Hold.TURN: Why.GATED, Hold.SHARE: Why.TENANT_CAP}


def _blocked(backend: Backend, now_ns: int) -> Why | None:
    if backend.phase is Phase.DOWN:
        return Why.BACKEND_DOWN
    if backend.silence.suspected:
        return Why.STALLED
    return Why.BACKING_OFF if now_ns < backend.quiet_until_ns else None


def nearest(name: str, known: Collection[str], count: int = 3) -> list[str]:
    """Return the known names that look most like `name`, best first.

    Only neighbours in the alphabet, read from the front and from the back, are compared: comparing with each of ten
    thousand names takes a quarter of a second.
    """
    name = name[:200]
    likely = _around(name, sorted(known))
    likely += [found[::-1] for found in _around(name[::-1], sorted(other[::-1] for other in known))]
    return difflib.get_close_matches(name, dict.fromkeys(likely), n=count, cutoff=0.5)


def _around(name: str, ordered: list[str], reach: int = 50) -> list[str]:
    place = bisect_left(ordered, name)
    return ordered[max(0, place - reach) : place + reach]
