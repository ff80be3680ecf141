"""Acts on runs: end one, queue its request again, cancel it."""

from __future__ import annotations

from policies.views import BASE
from sidecar.core import queueing, storing
from sidecar.core.causes import Cause
from sidecar.core.effects import CancelRun
from sidecar.core.enums import Voided
from sidecar.core.state import Backend, Request
from sidecar.core.step import Step
from sidecar.errors import Reason


def end_run(step: Step, request: Request, output_tokens: int) -> Backend:
    """Free the seat, the KV tokens and the pins of a run. The caller settles or requeues the request."""
    assert request.backend is not None
    backend = step.state.backends[request.backend]
    del backend.running[request.id]
    backend.more_sequences -= request.view.sequences - 1
    backend.kv_reserved -= request.kv_tokens(backend)
    queueing.remove_outstanding(step, request, backend)
    request.running = False
    backend.ordering.ended(request.view, output_tokens, step.now_ns)
    if request.version != BASE:
        slot = backend.slots[request.version]
        slot.running -= 1
        if slot.stale and not slot.running:
            backend.close_slot(request.version)  # the engine has lost the version, and others may wait for the slot
        backend.recount(request.version)
        backend.shadow.ended(request.version)
        storing.unpin(step, request.pinned_key)
        request.pinned_key = ""
    backend.full_until_ns = 0  # its adapter may be evicted now
    step.dirty[backend.id] = None
    return backend


def requeue(step: Step, request: Request) -> None:
    """Queue a request that ran without a token again, at its old position in arrival order."""
    queueing.void_promise(step, request, Voided.RUN_AGAIN)
    request.backend = None
    request.cache = None
    request.first_token = request.unheard = request.unseen = False
    request.dispatched_ns = 0
    _extend_wait(step, request)
    queueing.route_or_refuse(step, request)


def _extend_wait(step: Step, request: Request) -> None:
    """Give a request a new expiry if the first one passed while it ran."""
    if request.expires_ns > step.now_ns:
        return
    limit = step.state.config.limit_of(request.view.klass)
    request.expires_ns = step.now_ns + limit.queue_wait_ns_max
    if request.deadline_ns is not None:
        request.expires_ns = min(request.expires_ns, request.deadline_ns)
    step.state.set_timer(request.expires_ns, request.id)


def cancel(step: Step, request: Request, reason: Reason, cause: Cause) -> None:
    """End a request wherever it is. A run keeps its seat until the engine confirms."""
    if not request.running:
        queueing.drop(step, request, reason, cause)
        return
    assert request.backend is not None
    queueing.settle(step, request, reason, cause)
    step.emit(CancelRun(request.id, request.attempt, request.backend))
