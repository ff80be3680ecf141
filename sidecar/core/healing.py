"""Heal: what each fault of an engine means, and how it is mended without the client noticing.

A fault before the first token is mended. After the first token nothing is retried. The table, fault by fault:

    engine miss          mark absent, load, dispatch again (bounded)
    cache full           wait for a completion on that backend, load again
    page claim           mark every idle adapter absent there, load again
    whole engine         each tokenless request once more; adapters whose Load was in flight are loaded alone
    unknown region       register the regions, once more
    engine queue full    back off, lower the limit
    rejected             final: the request ends with the engine's message
    backend lost         route again, two backends at most; a version that two backends died of is quarantined
    no answer            the engine said nothing: a Load that was late or never sent is tried again later
    not owned            never sent, since another replica owns the backend by now: the request is given back
    deadly adapter       quarantined at once: the engine named the adapter as what has ended it
"""

from __future__ import annotations

from policies.views import BASE
from sidecar.core import causes, eligibility, queueing, running, storing
from sidecar.core.causes import Cause
from sidecar.core.dispatching import end_load
from sidecar.core.effects import RegisterRegions
from sidecar.core.eligibility import believed_page_limit, page_limit
from sidecar.core.enums import Fault, Phase, Voided
from sidecar.core.events import BackendLost, LoadFailed, RunFailed
from sidecar.core.facts import Suspicion
from sidecar.core.shadow import Belief
from sidecar.core.silence import Silence
from sidecar.core.state import Backend, LoadRun, Request, State, Version
from sidecar.core.step import Step
from sidecar.core.suspects import quarantine, suspect
from sidecar.errors import Reason


def run_failed(step: Step, event: RunFailed) -> None:
    """Handle RunFailed: the engine answered a request with an error, or its stream broke."""
    request = step.state.requests.get(event.request)
    if request is None or request.attempt != event.attempt or not request.running:
        return
    request.tokens = max(event.output_tokens, int(request.first_token))
    backend = running.end_run(step, request, request.tokens)
    if request.settled:
        if event.fault is Fault.MISS:
            _forget_missed(step, backend, request)
        queueing.release(step, request)
        return
    if request.tokens:
        _fail(step, request, Reason.BACKEND_FAILED, causes.Failed(backend.id, request.tokens, event.text))
    else:
        _TOKENLESS[event.fault](step, request, backend, event.text)


def _fail(step: Step, request: Request, reason: Reason, cause: Cause) -> None:
    queueing.settle(step, request, reason, cause)
    queueing.release(step, request)


def _again(step: Step, request: Request, backend: Backend, fault: Fault) -> None:
    """Queue a tokenless request again, at most `heals_max` times in its life for each cache that it may meet."""
    request.heals += 1
    step.heal(backend, fault.value, request.version)
    if request.heals > step.state.config.heals_max * backend.facts.caches:
        cause = causes.GivenUp(request.heals, backend.id, fault.value)
        _fail(step, request, Reason.BACKEND_FAILED, cause)
        return
    running.requeue(step, request)


def _miss(step: Step, request: Request, backend: Backend, text: str) -> None:
    """Handle an engine miss: the engine has evicted the adapter or restarted."""
    if request.version == BASE:  # a client's own LoRA, which only the client can send again
        _rejected(step, request, backend, text)
        return
    _forget_missed(step, backend, request)
    _again(step, request, backend, Fault.MISS)


def _forget_missed(step: Step, backend: Backend, request: Request) -> None:
    """Believe a miss, unless the version was loaded after the request was sent: then another miss has mended it."""
    belief = backend.shadow.host.held.get(request.version)
    if belief is None or belief.since_ns <= request.dispatched_ns:
        _learn_from_eviction(backend, request.version, belief)
        _forget(step, backend, request.version)


def _learn_from_eviction(backend: Backend, digest: str, belief: Belief | None) -> None:
    """Open fewer pages at once after the engine evicted a version that was loaded into its current slot.

    The engine's cache then holds less than believed, and without a lower limit the open versions would push each other
    out for ever. A belief older than the slot was just wrong and teaches nothing.
    """
    slot = backend.slots.get(digest)
    if slot is None or belief is None or belief.since_ns < slot.opened_ns or backend.facts.caches > 1:
        return
    opened = sum(other.pages for other in backend.slots.values())
    backend.pages_learned = max(slot.pages, min(page_limit(backend) or opened, opened) - slot.pages)
    backend.pages_credit = 0


def _learn_from_full(backend: Backend, digest: str) -> None:
    """Limit the open pages to those that run now, if the size of the engine's cache is unknown."""
    if backend.facts.host_pages_total is not None:
        return
    running = sum(slot.pages for version, slot in backend.slots.items() if slot.running and version != digest)
    if running:
        backend.pages_learned = min(running, page_limit(backend) or running)
        backend.pages_credit = 0


def _forget(step: Step, backend: Backend, digest: str) -> None:
    backend.shadow.forget(digest)
    step.state.where.lost(step.state, backend, (digest,))
    _reload(step, backend, digest)


def _reload(step: Step, backend: Backend, digest: str) -> None:
    """Have a version opened anew, or loaded again into the slot in which requests of it still run."""
    slot = backend.slots.get(digest)
    if slot is not None and slot.running:
        if slot.load is None:
            slot.stale = True
            backend.stale[digest] = None
    elif slot is not None and slot.load is None:
        backend.close_slot(digest)
    if digest != BASE:
        storing.handle_loss(step, step.state.packed_for(digest, backend).key)


def _full(step: Step, request: Request, backend: Backend, text: str) -> None:
    """Handle a full cache: the engine could not take the adapter in, so it does not have it."""
    _learn_from_full(backend, request.version)
    _forget(step, backend, request.version)
    _wait_for_a_completion(step, backend)
    _again(step, request, backend, Fault.FULL)


def _wait_for_a_completion(step: Step, backend: Backend) -> None:
    """Load nothing here until a run completes or a growing pause ends, since other clients may use the engine too."""
    config = step.state.config
    backend.full_backoff_ns = min(config.retry_ns_max, max(config.retry_ns, 2 * backend.full_backoff_ns))
    backend.full_until_ns = step.now_ns + backend.full_backoff_ns
    step.state.set_timer(backend.full_until_ns)


def _page_claim(step: Step, request: Request, backend: Backend, text: str) -> None:
    forget_idle(step, backend)
    _engine_failed(step, request, backend, Fault.PAGE_CLAIM, text)


def forget_idle(step: Step, backend: Backend) -> None:
    """Believe that nothing idle is left in the engine: it evicted all it could before it failed."""
    step.state.where.lost(step.state, backend, backend.shadow.forget_idle())
    for version, slot in list(backend.slots.items()):
        if not backend.slot_in_use(slot) and not eligibility.resident(backend, version):
            backend.close_slot(version)
    for version in backend.queued_by_version:
        if version != BASE:
            storing.handle_loss(step, step.state.packed_for(version, backend).key)


def _whole_engine(step: Step, request: Request, backend: Backend, text: str) -> None:
    _engine_failed(step, request, backend, Fault.WHOLE_ENGINE, text)


def _engine_failed(step: Step, request: Request, backend: Backend, fault: Fault, text: str) -> None:
    """Send a request once more after an engine failure before its first token; fail it the second time."""
    request.engine_failures += 1
    if request.engine_failures > 1:
        _fail(step, request, Reason.BACKEND_FAILED, causes.FailedTwice(backend.id, text))
        return
    _again(step, request, backend, fault)


def _unknown_region(step: Step, request: Request, backend: Backend, text: str) -> None:
    if request.region_heals:
        _rejected(step, request, backend, text)
        return
    request.region_heals += 1
    step.emit(RegisterRegions(backend.id))
    _again(step, request, backend, Fault.UNKNOWN_REGION)


def _queue_full(step: Step, request: Request, backend: Backend, text: str) -> None:
    _back_off(step, backend)
    step.heal(backend, Fault.QUEUE_FULL.value, request.version)
    running.requeue(step, request)


def _back_off(step: Step, backend: Backend) -> None:
    """Handle a full engine queue: pause dispatching for a growing time, and keep fewer in flight from now on."""
    queueing.void_promises(step, backend, Voided.ENGINE_QUEUE_FULL)
    backend.seats_learned = max(1, backend.in_flight)
    backend.seats_credit = 0
    _pause(step, backend)


def _pause(step: Step, backend: Backend) -> None:
    """Send nothing to a backend for a growing time."""
    config = step.state.config
    backend.quiet_backoff_ns = min(config.retry_ns_max, max(config.retry_ns, 2 * backend.quiet_backoff_ns))
    backend.quiet_until_ns = step.now_ns + backend.quiet_backoff_ns
    step.state.set_timer(backend.quiet_until_ns)


def _grow_pages(backend: Backend) -> None:
    """Raise a lowered page limit: by one page for every sixteen completed runs per page."""
    if backend.pages_learned is None:
        return
    backend.pages_credit += 1
    if backend.pages_credit >= 16 * backend.pages_learned:
        backend.pages_learned, backend.pages_credit = backend.pages_learned + 1, 0
    if backend.pages_learned >= believed_page_limit(backend):
        backend.pages_learned = None


def run_completed(backend: Backend, seats_declared: int) -> None:
    """Raise a lowered seat limit: by one seat for each full batch that completed."""
    backend.quiet_backoff_ns = 0
    _grow_pages(backend)
    if backend.seats_learned is None:
        return
    backend.seats_credit += 1
    if backend.seats_credit >= backend.seats_learned:
        backend.seats_learned, backend.seats_credit = backend.seats_learned + 1, 0
    if backend.seats_learned >= seats_declared:
        backend.seats_learned = None


def _rejected(step: Step, request: Request, backend: Backend, text: str) -> None:
    _fail(step, request, Reason.BACKEND_REJECTED, causes.Rejected(text))


def _lost(step: Step, request: Request, backend: Backend, text: str) -> None:
    """Handle a request's stream that broke before its first token, or whose backend is gone.

    A broken stream is often the first sign of a dead engine: a pause keeps the second visit from being spent on it.
    """
    if backend.phase is Phase.UP:
        _pause(step, backend)
    request.losses.append(backend.id)
    if len(request.losses) >= step.state.config.visits_max:
        cause = causes.Lost(tuple(request.losses), text, step.state.config.visits_max)
        _fail(step, request, Reason.BACKEND_FAILED, cause)
        return
    _again(step, request, backend, Fault.LOST)


def _not_owned(step: Step, request: Request, backend: Backend, text: str) -> None:
    """Give the request back: it was never sent, since the lease had ended."""
    _fail(step, request, Reason.NOT_OWNER, causes.LeaseEnded(backend.id))


def _deadly(step: Step, request: Request, backend: Backend, text: str) -> None:
    """Quarantine the version: the next engine would end, too."""
    if request.version == BASE:
        _rejected(step, request, backend, text)
        return
    suspicion = Suspicion((backend.id,), text, has_ended=True)
    version = step.state.versions[request.version]
    queueing.settle(step, request, Reason.QUARANTINED, causes.Quarantined(suspicion))
    version.lost_backends.append(backend.id)
    quarantine(step, request.version, version, suspicion)
    queueing.release(step, request)


_TOKENLESS = {
    Fault.MISS: _miss,
    Fault.FULL: _full,
    Fault.PAGE_CLAIM: _page_claim,
    Fault.WHOLE_ENGINE: _whole_engine,
    Fault.UNKNOWN_REGION: _unknown_region,
    Fault.QUEUE_FULL: _queue_full,
    Fault.REJECTED: _rejected,
    Fault.LOST: _lost,
    Fault.NO_ANSWER: _lost,
    Fault.NOT_OWNED: _not_owned,
    Fault.DEADLY: _deadly,
}


# Loads.


def load_failed(step: Step, event: LoadFailed) -> None:
    """Handle LoadFailed. No request was dispatched on it, so nothing is lost."""
    load = step.state.loads.get(event.load)
    if load is None:
        return
    backend = end_load(step, load)
    _reload(step, backend, load.digest)
    version = step.state.versions[load.digest]
    step.heal(backend, f"load_{event.fault.value}", load.digest)
    _LOADS[event.fault](step, load, version, backend, event.text)
    storing.forget_version_if_unused(step, load.digest)


def _load_full(step: Step, load: LoadRun, version: Version, backend: Backend, text: str) -> None:
    _wait_for_a_completion(step, backend)


def _load_page_claim(step: Step, load: LoadRun, version: Version, backend: Backend, text: str) -> None:
    forget_idle(step, backend)
    _wait_for_a_completion(step, backend)


def _load_whole_engine(step: Step, load: LoadRun, version: Version, backend: Backend, text: str) -> None:
    """Suspect the version: the engine failed as a whole while it was being loaded."""
    suspect(step, load.digest, version, backend, text)
    _wait_for_a_completion(step, backend)


def _load_queue_full(step: Step, load: LoadRun, version: Version, backend: Backend, text: str) -> None:
    _back_off(step, backend)


def _load_lost(step: Step, load: LoadRun, version: Version, backend: Backend, text: str) -> None:
    """Try again after a pause: the Load's own connection broke while the backend is up."""
    suspect(step, load.digest, version, backend, text)
    _pause(step, backend)


def _load_rejected(step: Step, load: LoadRun, version: Version, backend: Backend, text: str) -> None:
    """Route the waiting requests elsewhere, or end them: the engine refuses these weights for good."""
    version.refused_by[backend.id] = text
    step.state.forget_servers_of(load.digest)
    for request_id in list(backend.queued_by_version.get(load.digest, ())):
        request = step.state.requests[request_id]
        queueing.dequeue(step, request)
        request.backend = None
        if eligibility.servers_for(step.state, request):
            queueing.route(step, request)
        else:
            queueing.settle(step, request, Reason.ADAPTER_UNAVAILABLE, causes.NotLoaded(backend.id, text))
            queueing.release(step, request)


def _load_not_owned(step: Step, load: LoadRun, version: Version, backend: Backend, text: str) -> None:
    """Do nothing: the Load was never sent, and giving up the backend has emptied its queue."""


def _load_deadly(step: Step, load: LoadRun, version: Version, backend: Backend, text: str) -> None:
    version.lost_backends.append(backend.id)
    quarantine(step, load.digest, version, Suspicion((backend.id,), text, has_ended=True))


_LOADS = {
    Fault.MISS: _load_rejected,
    Fault.FULL: _load_full,
    Fault.PAGE_CLAIM: _load_page_claim,
    Fault.WHOLE_ENGINE: _load_whole_engine,
    Fault.UNKNOWN_REGION: _load_rejected,
    Fault.QUEUE_FULL: _load_queue_full,
    Fault.REJECTED: _load_rejected,
    Fault.LOST: _load_lost,
    Fault.NO_ANSWER: _load_full,
    Fault.NOT_OWNED: _load_not_owned,
    Fault.DEADLY: _load_deadly,
}


# Whole backends.


def backend_lost(step: Step, event: BackendLost) -> None:
    """Handle BackendLost: the backend's runs, loads and caches are gone."""
    backend = step.state.backends[event.backend]
    if backend.phase is not Phase.DOWN:
        lose(step, backend, event.cause)


def lose(step: Step, backend: Backend, cause: str) -> None:
    """Take a backend from up to down, and all it held with it."""
    backend.phase = Phase.DOWN
    backend.fresh = True
    step.state.joining.pop(backend.id, None)
    step.state.forget_servers()
    queueing.void_promises(step, backend, Voided.BACKEND_LOST)
    step.heal(backend, Fault.LOST.value, BASE)
    _lose_loads(step, backend, cause)
    runs = [step.state.requests[request_id] for request_id in list(backend.running)]
    for request in runs:
        running.end_run(step, request, request.tokens)
    reset_beliefs(step.state, backend)
    queueing.reroute_queue(step, backend)
    for request in runs:
        _lose_run(step, request, backend, cause)


def _lose_loads(step: Step, backend: Backend, cause: str) -> None:
    loads = [step.state.loads[load_id] for load_id in list(backend.loads)]
    for load in loads:
        end_load(step, load)
    for load in loads:
        version = step.state.versions[load.digest]
        if not backend.leaving:  # a leaving backend goes for reasons of its own
            suspect(step, load.digest, version, backend, cause)
        storing.forget_version_if_unused(step, load.digest)


def _lose_run(step: Step, request: Request, backend: Backend, cause: str) -> None:
    if request.settled:
        queueing.release(step, request)
    elif request.first_token:
        _fail(step, request, Reason.BACKEND_FAILED, causes.LostMidway(backend.id, cause))
    else:
        _lost(step, request, backend, cause)


def reset_beliefs(state: State, backend: Backend) -> None:
    """Forget all beliefs about an engine that is gone or has restarted."""
    held = list(backend.shadow.host.held)
    backend.shadow.clear()
    state.where.lost(state, backend, held)
    for version in list(backend.slots):
        backend.close_slot(version)
    backend.silence = Silence()
    backend.lone_load = None
    backend.pages_learned = None
    backend.kv_of_others.clear()
    backend.full_until_ns = backend.full_backoff_ns = 0
    backend.quiet_until_ns = backend.quiet_backoff_ns = 0
