"""Questions about the state that change nothing: which backends can serve a version, and what a request waits for.

The functions that act assert the same answers, so "could be sent" and "is sent" cannot disagree.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Collection, Iterable
from enum import Enum

from policies.record import record
from policies.views import BASE, Hold, Waiting
from sidecar.core.causes import NoBackend
from sidecar.core.enums import Phase
from sidecar.core.misfits import Drained, Draining, LoadRejected, Misfit, StoreTooSmall, misfit
from sidecar.core.state import NEVER_NS, Backend, Request, State, Version


class Why(Enum):
    """Why a queued request is not running; the label in the queue command, the log and the metrics."""

    BACKEND_DOWN = "backend down"
    STALLED = "stalled?"
    BACKING_OFF = "backing off"
    FETCHING = "fetching"
    STORE_FULL = "host store full"
    LOADING = "loading"
    HOST_CACHE_FULL = "engine host cache full"
    SLOTS_BUSY = "slots busy"
    SEATS_FULL = "seats full"
    KV_FULL = "KV cache full"
    PROBATION = "first load under way elsewhere"
    APART = "kept apart from a suspect load"
    GATED = "gated"
    TENANT_CAP = "tenant cap"
    NEXT = "next"


def cannot_serve(state: State, backend: Backend, digest: str) -> Misfit | None:
    """Return why a backend can never serve a version as configured, drained or learned; None if it can."""
    if backend.draining:
        return Draining() if backend.running else Drained()
    return unfit_for(state, backend, digest)


def unfit_for(state: State, backend: Backend, digest: str) -> Misfit | None:
    """Return why a backend could not serve a version even if it were not drained; None if it could."""
    if digest == BASE:
        return None
    version = state.versions[digest]
    refused = version.refused_by.get(backend.id)
    if refused is not None:
        return LoadRejected(refused)
    return _unfit_by_facts(state, backend, digest)


def _unfit_by_facts(state: State, backend: Backend, digest: str) -> Misfit | None:
    """Return why an engine cannot serve a version by its facts and the store's size alone, or None."""
    if digest == BASE:
        return None
    packed = state.packed_for(digest, backend)
    if packed.size_bytes > state.config.store_bytes:
        return StoreTooSmall(packed.size_bytes, state.config.store_bytes)
    return state.misfit_of(digest, backend)


def servers_of(state: State, digest: str) -> tuple[Backend, ...]:
    """Return the backends that can serve a version, up or down, in configured order."""
    servers = state.servers.get(digest)
    if servers is None:
        servers = state.servers[digest] = _servers_of_groups(state, digest)
    return servers


def _servers_of_groups(state: State, digest: str) -> tuple[Backend, ...]:
    """Return what `servers_of` does; versions that the same groups of engines can serve share one tuple."""
    known = state.versions.get(digest)
    refused = () if known is None else tuple(known.refused_by)
    fit = tuple(state.group_of(b) for b in state.one_of_each_group() if _unfit_by_facts(state, b, digest) is None)
    servers = state.servers_of_groups.get((fit, refused))
    if servers is None:
        servers = tuple(b for b in state.backends.values() if cannot_serve(state, b, digest) is None)
        state.servers_of_groups[fit, refused] = servers
    return servers


def longest_sequence(state: State, digest: str, only: tuple[str, ...]) -> int:
    """Return the tokens of the longest sequence, prompt included, that a backend which can serve a version runs."""
    all_servers = servers_of(state, digest)
    longest = None if only else state.longest.get(id(all_servers))
    if longest is None:
        assumed = state.config.sequence_tokens_assumed
        servers = among(all_servers, only)
        longest = max((backend.facts.sequence_tokens_max or assumed for backend in servers), default=assumed)
        if not only:
            state.longest[id(all_servers)] = longest
    return longest


def servers_for(state: State, request: Request) -> tuple[Backend, ...]:
    """Return the backends that can serve a request and that it may go to, up or down."""
    servers = among(servers_of(state, request.version), request.only)
    return tuple(server for server in servers if server.can_seat(request.view.sequences, state.config))


def among(servers: tuple[Backend, ...], only: tuple[str, ...]) -> tuple[Backend, ...]:
    """Return the backends that a request may go to: `only` holds ids of backends and of pools, empty means any."""
    return servers if not only else tuple(server for server in servers if _is_among(server, only))


def _is_among(backend: Backend, only: tuple[str, ...]) -> bool:
    return backend.id in only or backend.group in only


def takers_of(state: State, digest: str, request: Waiting, only: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the ids of backends in `only` that are up, serve a version, and have the context and seats for a request.

    Joining backends are left out unless there is no other; those suspected of a stall unless there is none at all.
    """
    servers = servers_of(state, digest)
    takers = state.takers.get(id(servers))
    if takers is None:
        up = [backend for backend in servers if backend.takes_requests]
        longest = min((backend.facts.input_tokens_max or NEVER_NS for backend in up), default=0)
        takers = state.takers[id(servers)] = (tuple(backend.id for backend in up), longest)
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
    """Return the backends that would take a request if they were not suspected: it waits there rather than nowhere."""
    return tuple(
        backend.id
        for backend in among(servers_of(state, digest), only)
        if backend.serves
        and long_enough(backend, request.input_tokens)
        and backend.can_seat(request.sequences, state.config)
    )


def are_gone(state: State, only: tuple[str, ...]) -> bool:
    """Return True if none of the backends in `only` is known here any more. A pool never counts as gone."""
    known = any(_is_among(backend, only) for backend in state.backends.values())
    return bool(only) and not known and not any(name in state.config.pools for name in only)


def may_come(state: State, digest: str, only: tuple[str, ...]) -> bool:
    """Return True if a backend for a version may still be discovered, in a pool that is empty now."""
    filled = {backend.pool for backend in state.backends.values()}
    return any(
        pool not in filled
        and (not only or pool in only)
        and (digest == BASE or misfit(state.versions[digest].adapter, facts) is None)
        for pool, facts in state.config.pools.items()
    )


def long_enough(backend: Backend, input_tokens: int) -> bool:
    """Return True if the engine takes a prompt of this length."""
    longest = backend.facts.input_tokens_max
    return longest is None or input_tokens <= longest


NEAR = 0.65
"""How alike a name is that is suggested for an unknown one: one wrong letter of three, or a word more or less."""


def no_backend(state: State, digest: str) -> NoBackend:
    """Return why no backend can serve a version."""
    unfit = ((backend.id, cannot_serve(state, backend, digest)) for backend in state.backends.values())
    found = tuple((backend, misfit) for backend, misfit in unfit if misfit is not None)
    return NoBackend(len(state.backends), found, tuple(state.config.pools))


def resident(backend: Backend, digest: str) -> bool:
    """Return True if the version is believed to be in the engine, so that its id alone is enough."""
    return digest == BASE or digest in backend.shadow.host.held


def awaits_fetch(state: State, key: str) -> bool:
    """Return True if a missing blob is being fetched or waits for other fetches; False if the store is full."""
    return state.store.fetches >= state.config.fetches_max or state.store.fetching(key)


def is_needed(state: State, key: str) -> bool:
    """Return True if a waiting request needs a blob at a backend whose engine does not hold it. Some request waits."""
    first = state.wanted[key].head()
    assert first is not None
    digest = state.requests[first].version
    waits_at = (state.backends[each] for each in state.where.queued.get(digest, ()))
    return any(state.packed_for(digest, each).key == key and not resident(each, digest) for each in waits_at)


@record(frozen=True, slots=True)
class PageRoom:
    """The pages free for versions yet to be opened, idle slots counted as free."""

    free: int
    nothing_busy: bool

    def takes(self, pages: int) -> bool:
        """Return True if `pages` fit beside the busy slots. An adapter larger than the limit may run alone."""
        return pages <= self.free or self.nothing_busy


def page_room(backend: Backend) -> PageRoom:
    return PageRoom(page_limit(backend) - backend.busy_pages, not backend.busy)


def page_limit(backend: Backend) -> int:
    """Return how many pages may be open at once; NEVER_NS without a limit.

    The device pages where known, else the learned estimate; capped by the host pages, past which the engine fails
    requests, and by what the engine was seen to hold.
    """
    believed = believed_page_limit(backend)
    return believed if backend.pages_learned is None else min(believed, backend.pages_learned)


def believed_page_limit(backend: Backend) -> int:
    """Return the page limit by the facts or by the learned estimate, without what engine misses have taught."""
    device, host = backend.facts.device_pages, backend.facts.host_pages_total
    if device is None and backend.facts.attaches:  # there is no Load to learn from
        return NEVER_NS if host is None else host
    if device is None:
        device = backend.estimate.pages
    return device if host is None else min(device, host)


def why_not_open(state: State, backend: Backend, digest: str, now_ns: int, room: PageRoom | None = None) -> Why | None:
    """Return what keeps a version from being opened on a backend now, or None. `room` saves counting the pages anew."""
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
    """Return why a blob is not in the store, or None if it is."""
    if state.store.has(key):
        return None
    return Why.FETCHING if awaits_fetch(state, key) else Why.STORE_FULL


def why_not_load(state: State, backend: Backend, version: Version, now_ns: int) -> Why | None:
    """Return what keeps a version in the store from being loaded, slots aside, or None."""
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
    """Return True if a Load of the version on another backend is worth waiting for.

    One at a stalled engine is not. Two are, for then the version itself may be what the engines stall on.
    """
    loading = [state.backends[backend_id] for backend_id in version.loads if backend_id != backend.id]
    return len(loading) > 1 or any(not other.silence.found for other in loading)


def on_probation_elsewhere(state: State, backend: Backend, version: Version) -> bool:
    """Return True if a version's first load is under way elsewhere, so that it may not be loaded here yet."""
    return not version.answered and loaded_elsewhere(state, backend, version)


def _suspect_is_next(state: State, backend: Backend) -> bool:
    """Return True if a suspect waits only for running Loads to end: new Loads would delay it for ever."""
    for digest in state.suspects:
        if digest not in backend.queued_by_version or state.versions[digest].loads:
            continue
        packed = state.packed_for(digest, backend)
        if backend.loads and state.store.has(packed.key) and page_room(backend).takes(packed.pages):
            return True
    return False


def _shelters_the_lost(state: State, backend: Backend) -> bool:
    """Return True if requests without a token run here that lost a backend before: one more loss would end them."""
    return any(request.losses and not request.first_token for request in (state.requests[i] for i in backend.running))


def why_not_send(state: State, backend: Backend, request: Request, now_ns: int) -> Why | None:
    """Return what keeps a queued request from being dispatched now, or None."""
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
    """Return what keeps a request queued elsewhere from being opened and dispatched here now, or None."""
    why = why_not_send(state, backend, request, now_ns)
    return _why_no_room(state, backend, request) if why is Why.NEXT else why


def _why_no_room(state: State, backend: Backend, request: Request) -> Why | None:
    """Return what keeps a request whose version is open from being dispatched, or None."""
    if not _finds_seats(state, backend, request):
        return Why.SEATS_FULL
    free = backend.kv_free
    if free is not None and backend.running and request.kv_tokens(backend) > free:
        return Why.KV_FULL
    if backend.lone_load is not None and request.losses:
        return Why.APART
    if backend.facts.base_apart and _others_among(state, backend.running, request):
        return Why.APART  # the ordering policy decides which side runs once they have ended
    return None


def _finds_seats(state: State, backend: Backend, request: Request) -> bool:
    """Return True if all sequences of a request find seats. One larger than the learned seats may still run alone."""
    seats, in_flight = backend.seats(state.config), backend.in_flight
    return in_flight + request.view.sequences <= seats or (in_flight == 0 and seats > 0)


def others_of(state: State, backend: Backend, request: Request) -> set[int]:
    """Return the requests at a backend of the other side: adapter requests for a base request, and vice versa."""
    return _others_among(state, (*backend.queued, *backend.running), request)


def _others_among(state: State, requests: Iterable[int], request: Request) -> set[int]:
    is_base = request.version == BASE
    return {other for other in requests if (state.requests[other].version == BASE) is not is_base}


def why_waiting(state: State, request: Request, now_ns: int) -> Why:
    """Return why a queued request is not running."""
    if request.backend is None:
        return Why.BACKEND_DOWN
    backend = state.backends[request.backend]
    why = why_not_take_over(state, backend, request, now_ns)  # of a version that could be opened: is there a seat?
    if why is not None:
        return why
    hold = backend.ordering.holds(request.id)
    return Why.NEXT if hold is None else _HOLDS[hold]


def reasons_to_wait(state: State, now_ns: int) -> dict[Why, int]:
    """Count all waiting requests by reason; every reason is a key.

    At each backend the first request of a version stands for all of that version, so the cost grows with the number of
    waiting versions and not of requests. Mostly it is the version that waits, or all wait behind the first.
    """
    counts = dict.fromkeys(Why, 0)
    counts[Why.BACKEND_DOWN] = len(state.unrouted)
    for backend in state.backends.values():
        for queue in backend.queued_by_version.values():
            counts[why_waiting(state, state.requests[queue.first()], now_ns)] += len(queue)
    return counts


_HOLDS = {Hold.TURN: Why.GATED, Hold.SHARE: Why.TENANT_CAP}


def _blocked(backend: Backend, now_ns: int) -> Why | None:
    if backend.phase is Phase.DOWN:
        return Why.BACKEND_DOWN
    if backend.silence.suspected:
        return Why.STALLED
    return Why.BACKING_OFF if now_ns < backend.quiet_until_ns else None


def nearest(name: str, known: Collection[str], count: int = 3) -> list[str]:
    """Return the known names most similar to `name`, best first.

    Only alphabetical neighbours of the name and of the reversed name are compared: comparing ten thousand names takes
    a quarter of a second.
    """
    name = name[:200]
    likely = _around(name, sorted(known))
    likely += [found[::-1] for found in _around(name[::-1], sorted(other[::-1] for other in known))]
    return difflib.get_close_matches(name, dict.fromkeys(likely), n=count, cutoff=NEAR)


def _around(name: str, ordered: list[str], reach: int = 50) -> list[str]:
    index = bisect_left(ordered, name)
    return ordered[max(0, index - reach) : index + reach]
