"""Suspect an engine that has something in flight and reports nothing, long before it counts as lost.

While an engine is suspected, nothing new is sent to it and a probe asks whether it lives. A sign of life restores it
at once, with its slots and all beliefs. If the probe fails too, its queue moves to other backends that can serve it,
and its runs stay: only the backend's own `progress_timeout_s` ends those.

Silence is measured in steps, so an engine whose pace is a guess is not judged by its runs. Prompts are read in
silence, so the time for prompts without a token yet is allowed for: what a calibrated pace says, else twice what the
slowest of late took. Until five have been read there, only runs that have had a token count. Answers that come all at
once say little: each answered probe doubles the allowed silence. A Load must end within ten seconds of silence on every
engine, since the time of a Load is unknown.

If the first Load of a version is in flight at an engine that turns out to stall, another engine may try it too, and
the promises to requests that wait for the version become void.
"""

from __future__ import annotations

from sidecar.core import eligibility, promising, queueing
from sidecar.core.effects import Probe
from sidecar.core.enums import Phase, Voided
from sidecar.core.events import BackendProbed, Progress
from sidecar.core.state import NEVER_NS, Backend, Request, State
from sidecar.core.step import Step

STEPS = 5
LEAST_NS = 2_000_000_000
"""An engine may be silent for this many steps, and for at least this long."""
LOAD_NS = 10_000_000_000
"""How long an engine may be silent if it has nothing but Loads to report."""
READ_MARGIN = 2.0
READ_GROWTH = 4
"""A suspected engine may have hung while it read: a token then counts as this many times what was allowed, at most."""
EXCUSES_MAX = 4
"""After this many doublings the allowed silence exceeds a usual `progress_timeout_s`."""
ASKED_AGAIN_NS = 5_000_000_000
"""How often a suspected engine is probed: nothing whose progress would tell may be in flight any more."""


def began(step: Step, backend: Backend) -> None:
    """Start counting silence, unless it counts already: a run or a Load is about to be sent."""
    if not (backend.running or backend.loads) or not backend.silence.due_ns:
        backend.silence.since_ns = step.now_ns


def note_life_sign(step: Step, backend: Backend) -> None:
    """Note a sign of life of an engine."""
    backend.silence.excused = 0
    _believe(step, backend)


def had_first_token(step: Step, backend: Backend, request: Request) -> None:
    """Note a run's first token, and what reading its prompt and others took."""
    state, silence = step.state, backend.silence
    if backend.facts.pace is None and not request.first_token:
        reading_ns = step.now_ns - silence.since_ns - promising.step_ns(state, backend)
        token_ns = reading_ns / max(1, _unread_tokens(state, backend)) if reading_ns > 0 else 0.0
        if silence.suspected:
            token_ns = min(token_ns, READ_GROWTH * _prompt_token_ns(state, backend))
        silence.reading.has_read(token_ns)
    request.first_token = True
    note_life_sign(step, backend)


def progressed(step: Step, backend: Backend, event: Progress) -> None:
    """Handle Progress: tokens came; or none can come, since clients block reading of everything that runs."""
    if any(event.tokens.values()):
        note_life_sign(step, backend)
    elif all(request in event.tokens for request in backend.running if _speaks(step.state, backend, request)):
        backend.silence.since_ns = step.now_ns


def probed(step: Step, event: BackendProbed) -> None:
    """Handle BackendProbed: a probe has said whether a suspected engine lives."""
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
    """Schedule a check of an engine, unless one is scheduled."""
    if backend.silence.due_ns:
        return
    if backend.loads or (backend.running and promising.pace_is_known(backend)):
        _check_in_time(step, backend, _due_ns(step.state, backend))


def _check_in_time(step: Step, backend: Backend, due_ns: int) -> None:
    """Schedule a check when it is due or before: a prompt that was read, or a token, may make it due earlier."""
    _check_at(step.state, backend, min(due_ns, step.now_ns + _steps_ns(step.state, backend)))


def _check_at(state: State, backend: Backend, due_ns: int) -> None:
    backend.silence.due_ns = due_ns
    state.listen_ns = min(state.listen_ns, due_ns)


def check(step: Step) -> None:
    """Check the engines whose time has come."""
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
            _check_at(state, backend, due_ns)


def _judge(step: Step, backend: Backend) -> None:
    """Suspect an engine that has been silent for too long; probe a suspected one again."""
    state, silence = step.state, backend.silence
    if silence.suspected:
        _probe(step, backend)
        return
    if silence.excused > EXCUSES_MAX or not (backend.loads or _has_to_speak(state, backend)):
        return
    due_ns = _due_ns(state, backend)
    if step.now_ns < due_ns:
        _check_in_time(step, backend, due_ns)
        return
    silence.suspected = True
    state.forget_servers()
    _probe(step, backend)


def _probe(step: Step, backend: Backend) -> None:
    within_ns = _steps_ns(step.state, backend)
    step.emit(Probe(backend.id, within_ns))
    _check_at(step.state, backend, step.now_ns + within_ns + ASKED_AGAIN_NS)


def _believe(step: Step, backend: Backend) -> None:
    """Count silence from now on, and restore an engine that was suspected."""
    silence = backend.silence
    silence.since_ns = step.now_ns
    if silence.suspected:
        silence.suspected, silence.found, silence.due_ns = False, "", 0
        step.state.forget_servers()
        step.dirty[backend.id] = None
    watch(step, backend)


def _has_to_speak(state: State, backend: Backend) -> bool:
    """Return True if some run should have reported something."""
    return promising.pace_is_known(backend) and any(_speaks(state, backend, request) for request in backend.running)


def _speaks(state: State, backend: Backend, request_id: int) -> bool:
    """Return True if a run should report something by now, apart from the time to read its prompt."""
    request = state.requests[request_id]
    reads_in_time = backend.facts.pace is not None or backend.silence.reading.known
    return not (request.settled or request.unheard) and (request.first_token or reads_in_time)


def _due_ns(state: State, backend: Backend) -> int:
    """Return until when an engine that runs or loads something may be silent."""
    silence = backend.silence
    if _has_to_speak(state, backend) or not backend.loads:
        return silence.since_ns + _patience_ns(state, backend)
    begun_ns = state.loads[next(iter(backend.loads))].begun_ns
    return max(silence.since_ns, begun_ns) + (LOAD_NS << silence.excused)


def _patience_ns(state: State, backend: Backend) -> int:
    """Return how long in ns an engine with runs may be silent."""
    prompts_ns = _prompt_token_ns(state, backend) * _unread_tokens(state, backend)
    return (_steps_ns(state, backend) << backend.silence.excused) + round(prompts_ns)


def _unread_tokens(state: State, backend: Backend) -> int:
    running = (state.requests[request] for request in backend.running)
    return sum(request.view.input_tokens for request in running if not request.first_token)


def _prompt_token_ns(state: State, backend: Backend) -> float:
    """Return how long in ns an engine may take to read a token of a prompt."""
    guess_ns = promising.pace_of(backend).prompt_token_ns
    if backend.facts.pace is not None:
        return guess_ns
    return READ_MARGIN * backend.silence.reading.token_ns(guess_ns)


def _steps_ns(state: State, backend: Backend) -> int:
    return max(round(STEPS * promising.step_ns(state, backend)), LEAST_NS)


def _move_queue(step: Step, backend: Backend) -> None:
    """Move a backend's queue to others that can serve it. Requests that no other can serve stay."""
    for request_id in list(backend.queued):
        request = step.state.requests[request_id]
        takers = eligibility.takers_of(step.state, request.version, request.view, request.only)
        if takers and backend.id not in takers:
            queueing.dequeue(step, request)
            queueing.route(step, request)


def _let_others_load(step: Step, backend: Backend) -> None:
    """Let other backends try the first Loads that hang at a stalled engine, and void promises that counted on them."""
    state = step.state
    unproven = {digest for load in backend.loads if not state.versions[digest := state.loads[load].digest].answered}
    if not unproven:
        return
    for other in state.backends.values():
        waiting = [each for each in other.queued if state.requests[each].version in unproven]
        queueing.void_queued(step, other, waiting, Voided.BACKEND_STALLED)
    step.dirty.update(dict.fromkeys(state.backends))
    state.pool_changed = True
