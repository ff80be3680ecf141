"""Acts on the queue: route a request, promise it a bound, move it, end it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from policies.id_queue import queue_of
from policies.views import BASE, HearsOfVoids
from sidecar.core import eligibility, promising, storing
from sidecar.core.causes import Cause, Gone, NotOwned
from sidecar.core.effects import Settle
from sidecar.core.enums import Voided, outcome_of
from sidecar.core.routing_view import RoutingView
from sidecar.core.state import Backend, Queued, Request
from sidecar.core.step import Step
from sidecar.errors import Reason

ANEW_MAX = 1_000


def promise(step: Step, request: Request, backend: Backend) -> int:
    """Promise an arriving request its longest wait; return the expected wait in ns."""
    _count_outstanding(step, request, backend)
    backlog = promising.backlog_of(step.state, backend, request)
    request.fetch_allowed_ns = backlog.fetch_ns
    request.queued_clock = step.state.lateness.clock(step.now_ns)
    if backend.facts.base_apart and eligibility.others_of(step.state, backend, request):
        void_promises(step, backend, Voided.KEPT_APART)
    elif not backend.silence.suspected and promising.bounds_hold(step.state, backend, request.version):
        request.promise = backend.ordering.promise(request.view, backlog, step.now_ns)
    if backend.silence.suspected or not promising.wait_is_known(backend):
        return 0  # a request is never refused on a guess
    expected_ns = backlog.queue_ns if request.promise is None else request.promise.expected_ns
    token_ns = backlog.turn_ns / backend.outstanding.longest_tokens
    return round(expected_ns * promising.sure_share(step.state, backend, request)) + promising.seat_ns(
        step.state, backend, token_ns
    )


def take_back(step: Step, request: Request, backend: Backend) -> None:
    """Undo the accounting of a request that is refused for its predicted wait."""
    _left_queue(request, backend)
    remove_outstanding(step, request, backend)


def route(step: Step, request: Request) -> None:
    """Queue a request anew at a backend, or set it aside while none can serve it. Its promise is void."""
    void_promise(step, request, Voided.MOVED)
    place(step, request, pick_backend(step, request))


def move(step: Step, request: Request, backend: Backend) -> None:
    """Move a waiting request to a backend that can send it at once, sooner than its promise: the promise holds."""
    step.taken_over = backend, request.id
    arrived_for(step, request)
    dequeue(step, request)
    enqueue(step, request, backend)


def pick_backend(step: Step, request: Request) -> Backend | None:
    """Ask the routing policy for a backend; None while no backend that can serve the request is up."""
    takers = eligibility.takers_of(step.state, request.version, request.view, request.only)
    if len(takers) > 1 and request.losses:
        takers = tuple(taker for taker in takers if taker not in request.losses) or takers
    if not takers:
        return None
    choice = step.state.routing.pick(request.view, RoutingView(step.state, request.version, takers), step.now_ns)
    return step.state.backends[choice.backend]


def place(step: Step, request: Request, backend: Backend | None) -> None:
    """Queue a request at a backend, or set it aside without one."""
    if backend is None:
        _set_aside(step, request)
    else:
        enqueue(step, request, backend)


def _set_aside(step: Step, request: Request) -> None:
    """Set aside a request that no backend can take now. Nothing bounds how long that lasts."""
    void_promise(step, request, Voided.NO_BACKEND)
    request.backend = None
    step.state.unrouted[request.id] = None
    _count_waiting(step, request, 1)


def _count_waiting(step: Step, request: Request, sign: int) -> None:
    state, tenant = step.state, request.view.tenant
    state.waiting.count(request, sign)
    of_tenant = state.tenant_queued.get(tenant)
    if of_tenant is None:
        of_tenant = state.tenant_queued[tenant] = Queued()
    of_tenant.count(request, sign)
    if not of_tenant.requests:
        del state.tenant_queued[tenant]


def enqueue(step: Step, request: Request, backend: Backend) -> None:
    _count_waiting(step, request, 1)
    request.backend = backend.id
    backend.queued[request.id] = None
    if request.version not in backend.queued_by_version:
        step.state.where.queue_begins(step.state, backend, request.version)
    queue_of(backend.queued_by_version, request.version).add(request.id)
    backend.recount(request.version)
    if not request.counted:
        _count_outstanding(step, request, backend)
    backend.ordering.queued(request.view, request.promise, step.now_ns)
    if request.version != BASE:
        key = step.state.packed_for(request.version, backend).key
        queue_of(step.state.wanted, key).add(request.id)
        if not step.state.store.has(key):
            storing.queue_fetch(step, key)
            if not eligibility.resident(backend, request.version):
                step.state.lateness.misses(key, step.now_ns)
    step.dirty[backend.id] = None


def _count_outstanding(step: Step, request: Request, backend: Backend) -> None:
    view = request.view
    request.counted = True
    promising.expect_tokens(step.state, request)
    weight = step.state.config.weight_of(view.tenant)
    backend.outstanding.add(view.tenant, weight, view.input_tokens, request.expected_tokens, view.output_tokens_max)
    backend.outstanding.doubt(request.unsure_tokens, request.guessed)


def _left_queue(request: Request, backend: Backend) -> None:
    backend.outstanding.left_queue(request.expected_tokens, request.unsure_tokens, request.guessed)


def expect_anew(step: Step, backend: Backend, version: str | None = None) -> None:
    """Expect anew what requests that are queued at a backend will generate, those of one version or all.

    What is known of lengths has changed much. Only the first few are looked at: there may be any number.
    """
    queued: Iterable[int] = backend.queued
    if version is not None:
        waiting = backend.queued_by_version.get(version)
        queued = () if waiting is None else waiting.first_few(ANEW_MAX)
    for request_id in list(islice(queued, ANEW_MAX)):
        request = step.state.requests[request_id]
        _left_queue(request, backend)
        remove_outstanding(step, request, backend)
        _count_outstanding(step, request, backend)


def remove_outstanding(step: Step, request: Request, backend: Backend) -> None:
    view = request.view
    request.counted = False
    backend.outstanding.remove(view.tenant, view.input_tokens, request.expected_tokens, view.output_tokens_max)


def void_promise(step: Step, request: Request, why: Voided) -> bool:
    """Void a request's promise; return False if it has none.

    It is given no new one, so nothing bounds its wait any more.
    """
    if request.promise is None:
        return False
    request.promise = None
    request.voided = why
    step.state.voided[why] = step.state.voided.get(why, 0) + 1
    return True


def void_promises(step: Step, backend: Backend, why: Voided) -> None:
    """Void the promises of a backend's queued requests, and of its running ones that have no token yet."""
    void_queued(step, backend, backend.queued, why)
    for request_id in backend.running:
        request = step.state.requests[request_id]
        if not request.first_token and not request.settled:
            void_promise(step, request, why)


def void_queued(step: Step, backend: Backend, queued: Iterable[int], why: Voided) -> None:
    """Void the promises of some of a backend's queued requests."""
    requests = step.state.requests
    voided = {request for request in queued if void_promise(step, requests[request], why)}
    if voided and isinstance(backend.ordering, HearsOfVoids):
        backend.ordering.voided(voided)


def dequeue(step: Step, request: Request, to_run: bool = False) -> None:
    """Take a queued request out of its queue, or from those set aside."""
    _count_waiting(step, request, -1)
    if request.backend is None:
        del step.state.unrouted[request.id]
        return
    backend = step.state.backends[request.backend]
    del backend.queued[request.id]
    queue = backend.queued_by_version[request.version]
    queue.discard(request.id)
    if not queue:
        del backend.queued_by_version[request.version]
        step.state.where.queue_ends(backend, request.version)
        backend.recount(request.version)
    backend.ordering.left(request.id, step.now_ns)
    _left_queue(request, backend)
    if not to_run:
        remove_outstanding(step, request, backend)
    if request.version != BASE:
        _no_longer_wants(step, request, step.state.packed_for(request.version, backend).key)
    step.dirty[backend.id] = None


def _no_longer_wants(step: Step, request: Request, key: str) -> None:
    queue = step.state.wanted[key]
    queue.discard(request.id)
    if not queue:
        del step.state.wanted[key]
        step.state.lateness.ends(key)
    step.hungry = True


def void_if_adapter_is_late(step: Step, request: Request) -> None:
    """Void the promise of a request that has waited longer for its adapter than the promise allows."""
    if request.fetch_ns + _missing_ns(step, request) > request.fetch_allowed_ns:
        void_promise(step, request, Voided.ADAPTER_LATE)


def arrived_for(step: Step, request: Request) -> None:
    """Add up how long a request has waited for a blob that has just arrived."""
    void_if_adapter_is_late(step, request)
    request.fetch_ns += _missing_ns(step, request)


def _missing_ns(step: Step, request: Request) -> int:
    """Return how long in ns neither the store nor its engine has had a queued request's adapter."""
    if request.backend is None or request.version == BASE:
        return 0
    backend = step.state.backends[request.backend]
    if eligibility.resident(backend, request.version):
        return 0
    key = step.state.packed_for(request.version, backend).key
    return step.state.lateness.waited_ns(key, request.view.arrived_ns, request.queued_clock, step.now_ns)


def reroute_queue(step: Step, backend: Backend, keeps_others: bool = False) -> None:
    """Route every request queued at a backend anew; with `keeps_others`, only what another backend takes now."""
    for request_id in list(backend.queued):
        request = step.state.requests[request_id]
        if keeps_others and not eligibility.takers_of(step.state, request.version, request.view, request.only):
            continue
        dequeue(step, request)
        request.backend = None
        route_or_refuse(step, request)


def route_or_refuse(step: Step, request: Request) -> None:
    """Route a request, or end it when no configured backend can serve it any more."""
    servers = eligibility.servers_for(step.state, request)
    if any(server.owned for server in servers):
        route(step, request)
        return
    _set_aside(step, request)
    if servers:
        drop(step, request, Reason.NOT_OWNER, NotOwned(tuple(server.id for server in servers)))
        return
    if eligibility.are_gone(step.state, request.only):
        drop(step, request, Reason.NOT_OWNER, Gone(request.only))
        return
    if eligibility.may_come(step.state, request.version, request.only):
        return
    drop(step, request, Reason.NO_BACKEND, eligibility.no_backend(step.state, request.version))


def route_unrouted(step: Step) -> None:
    """Try again to route the requests that were set aside, oldest first."""
    for request_id in sorted(step.state.unrouted):
        request = step.state.requests[request_id]
        dequeue(step, request)
        route_or_refuse(step, request)


def drop(step: Step, request: Request, reason: Reason, cause: Cause, retry_after_ns: int | None = None) -> None:
    """End a queued request with a reason."""
    void_if_adapter_is_late(step, request)
    dequeue(step, request)
    settle(step, request, reason, cause, retry_after_ns=retry_after_ns)
    release(step, request)


def settle(
    step: Step,
    request: Request,
    reason: Reason | None,
    cause: Cause | None = None,
    retry_after_ns: int | None = None,
) -> None:
    """Settle a request: its client gets its one ending."""
    assert not request.settled, f"request {request.id} was settled already"
    request.settled = True
    dispatched = request.dispatched_ns or step.now_ns
    step.emit(
        Settle(
            request=request.id,
            outcome=outcome_of(reason),
            name=request.view.name,
            tenant=request.view.tenant,
            klass=request.view.klass,
            queue_ns=dispatched - request.view.arrived_ns,
            input_tokens=request.view.input_tokens,
            output_tokens=request.tokens,
            reason=reason,
            cause=cause,
            backend=request.backend or "",
            version=request.version,
            retry_after_ns=retry_after_ns,
            bound_ns=None if request.promise is None else request.promise.bound_ns,
            voided=request.voided,
            is_estimated=request.unseen,
        )
    )


def release(step: Step, request: Request) -> None:
    """Forget a request that has ended both here and at its engine."""
    del step.state.requests[request.id]
    if request.version != BASE:
        step.state.versions[request.version].requests -= 1
        storing.forget_version_if_unused(step, request.version)
