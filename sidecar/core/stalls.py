"""An engine that has something in flight and says nothing is suspected long before it is given up as lost.

While it is suspected nothing new is sent to it and a probe asks whether it lives. A sign of life gives it back at
once, with its slots and all that is believed of it. If the probe says nothing either, what waits there goes to others
that can serve it, and what runs there stays: only the backend's own `progress_timeout_s` ends that.

It is judged by steps, so one whose pace is a guess is not judged at all. Prompts are read in silence: the time for
those that have had no token yet is allowed for. Where that time is a guess, only runs that have had a token count. Nor
do answers say much that come all at once: each probe that the engine answers doubles how long it may be silent.
A Load is owed its end within ten seconds of silence, by every engine: how long one takes is not known.

Where the first Load of a version is in flight at an engine that turns out to stall, another engine may try, too, and
what was promised to those who wait for the version is void.
"""

from __future__ import annotations

from sidecar.core import eligibility, promising, queueing
from sidecar.core.effects import Probe
from sidecar.core.enums import Phase, Voided
from sidecar.core.events import BackendProbed, Progress
from sidecar.core.state import NEVER_NS, Backend, State
from sidecar.core.step import Step

STEPS = 5
LEAST_NS = 2_000_000_000
"""So many steps, and at least so long, an engine may be silent."""
LOAD_NS = 10_000_000_000
"""So long an engine may be silent that has nothing but Loads to tell of."""
EXCUSES_MAX = 4
"""After so many doublings it may be silent for longer than `progress_timeout_s` usually is."""
ASKED_AGAIN_NS = 5_000_000_000
"""A suspected one is asked so often: nothing may be in flight any more whose progress would tell."""


def began(step: Step, backend: Backend) -> None:
    """Something is about to be sent or loaded: from now on silence counts, unless it does already."""
    if not (backend.running or backend.loads) or not backend.silence.due_ns:
        backend.silence.since_ns = step.now_ns


def heard(step: Step, backend: Backend) -> None:
    """An engine gave a sign of life."""
    backend.silence.excused = 0
    _believe(step, backend)


def progressed(step: Step, backend: Backend, event: Progress) -> None:
    """Tokens came; or nothing can be heard, since clients keep all that runs from being read."""
    if any(event.tokens.values()):
        heard(step, backend)
    elif all(request in event.tokens for request in backend.running if _speaks(step.state, backend, request)):
        backend.silence.since_ns = step.now_ns


def probed(step: Step, event: BackendProbed) -> None:
    """A probe has said whether a suspected engine lives."""
    backend = step.state.backends[event.backend]
    silence = backend.silence
    if not silence.suspected:
        return
    if event.alive:
        silence.excused += 1
        _believe(step, backend)
    elif not silence.found:
        silence.found = event.text
        queueing.void_promises(step, backend, Voided.BACKEND_STALLED)
        _move_queue(step, backend)
        _let_others_load(step, backend)


def watch(step: Step, backend: Backend) -> None:
    """Have an engine looked at in time, if it is not already."""
    if backend.silence.due_ns:
        return
    if backend.loads or (backend.running and promising.pace_is_known(backend)):
        _look_in_time(step, backend, _due_ns(step.state, backend))


def _look_in_time(step: Step, backend: Backend, due_ns: int) -> None:
    """Look when it is due, or before: once a prompt has been read, or a token has come, it may be due earlier."""
    _look_at(step.state, backend, min(due_ns, step.now_ns + _steps_ns(step.state, backend)))


def _look_at(state: State, backend: Backend, due_ns: int) -> None:
    backend.silence.due_ns = due_ns
    state.listen_ns = min(state.listen_ns, due_ns)


def look(step: Step) -> None:
    """Look at the engines whose time has come."""
    state = step.state
    if step.now_ns < state.listen_ns:
        return
    state.listen_ns = NEVER_NS
    for backend in state.backends.values():
        due_ns = backend.silence.due_ns
        if due_ns and due_ns <= step.now_ns:
            backend.silence.due_ns = 0
            if backend.phase is Phase.UP and backend.owned:
                _judge(step, backend)
        elif due_ns:
            _look_at(state, backend, due_ns)


def _judge(step: Step, backend: Backend) -> None:
    """Suspect an engine that has been silent for too long; ask a suspected one again."""
    state, silence = step.state, backend.silence
    if silence.suspected:
        _ask(step, backend)
        return
    if silence.excused > EXCUSES_MAX or not (backend.loads or _has_to_speak(state, backend)):
        return
    due_ns = _due_ns(state, backend)
    if step.now_ns < due_ns:
        _look_in_time(step, backend, due_ns)
        return
    silence.suspected = True
    state.forget_servers()
    _ask(step, backend)


def _ask(step: Step, backend: Backend) -> None:
    within_ns = _steps_ns(step.state, backend)
    step.emit(Probe(backend.id, within_ns))
    _look_at(step.state, backend, step.now_ns + within_ns + ASKED_AGAIN_NS)


def _believe(step: Step, backend: Backend) -> None:
    """Count silence from now on, and take back an engine that was suspected."""
    silence = backend.silence
    silence.since_ns = step.now_ns
    if silence.suspected:
        silence.suspected, silence.found, silence.due_ns = False, "", 0
        step.state.forget_servers()
        step.dirty[backend.id] = None
    watch(step, backend)


def _has_to_speak(state: State, backend: Backend) -> bool:
    """Whether something is to be heard of what runs."""
    return promising.pace_is_known(backend) and any(_speaks(state, backend, request) for request in backend.running)


def _speaks(state: State, backend: Backend, request_id: int) -> bool:
    """Whether something is to be heard of a run by now, apart from the time that its prompt takes."""
    request = state.requests[request_id]
    return not request.settled and (request.first_token or backend.facts.pace is not None)


def _due_ns(state: State, backend: Backend) -> int:
    """Return until when an engine may be silent; it runs or loads something."""
    silence = backend.silence
    if _has_to_speak(state, backend) or not backend.loads:
        return silence.since_ns + _patience_ns(state, backend)
    begun_ns = state.loads[next(iter(backend.loads))].begun_ns
    return max(silence.since_ns, begun_ns) + (LOAD_NS << silence.excused)


def _patience_ns(state: State, backend: Backend) -> int:
    """Return how long an engine may be silent that runs something."""
    unread = (state.requests[request] for request in backend.running if not state.requests[request].first_token)
    prompts_ns = promising.pace_of(backend).prompt_token_ns * sum(request.view.input_tokens for request in unread)
    return (_steps_ns(state, backend) << backend.silence.excused) + round(prompts_ns)


def _steps_ns(state: State, backend: Backend) -> int:
    return max(round(STEPS * promising.step_ns(state, backend)), LEAST_NS)


def _move_queue(step: Step, backend: Backend) -> None:
    """Move what waits at a backend to others that can serve it; what none can stays."""
    for request_id in list(backend.queued):
        request = step.state.requests[request_id]
        takers = eligibility.takers_of(step.state, request.version, request.view, request.only)
        if takers and backend.id not in takers:
            queueing.dequeue(step, request)
            queueing.route(step, request)


def _let_others_load(step: Step, backend: Backend) -> None:
    """Take in that a version's first Load may last for as long as its engine stalls: others need not wait for it."""
    state = step.state
    unproven = {digest for load in backend.loads if not state.versions[digest := state.loads[load].digest].answered}
    if not unproven:
        return
    for request in state.requests.values():
        if request.version in unproven and not request.running:
            queueing.void_promise(step, request, Voided.BACKEND_STALLED)
    step.dirty.update(dict.fromkeys(state.backends))
    state.pool_changed = True
