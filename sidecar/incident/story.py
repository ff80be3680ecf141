"""Follow one request through a replay, step by step, until it ends.

Every instant between its arrival and its last dispatch belongs to exactly one period: waiting for a reason, at an
engine in vain, or not journaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from policies.views import BASE
from sidecar.core import effects as do
from sidecar.core import eligibility
from sidecar.core import events as ev
from sidecar.core.state import Backend, Request, State
from sidecar.incident.witness import Routed
from sidecar.journal.replay import Replayed
from sidecar.telling import saying
from sidecar.telling.life import Life
from sidecar.telling.naming import called
from sidecar.telling.saying import Told
from sidecar.telling.timeline import IDS_KEPT_MAX, NOT_JOURNALED, SENT, Tally, Timeline
from sidecar.telling.waits import in_the_way

_CHANGES_THE_CACHE = (ev.LoadDone, ev.LoadFailed, ev.RunFailed, ev.BackendUp, ev.BackendLost)
_OF_A_REQUEST = (ev.Received, ev.FirstToken, ev.RunEnded, ev.RunFailed)
_OF_A_BACKEND = (ev.Progress, ev.BackendMeasured)
_LOCAL = (do.Dispatch, do.CancelRun, do.Settle)


class Surroundings:
    """Watches the backend and the version of one request from step to step."""

    def __init__(self, request: int) -> None:
        self._request = request
        self._version = BASE
        self._backend = ""
        self._key = ""
        self._loads: dict[int, None] = {}
        self._slots: dict[str, None] = {}
        self._held: dict[str, None] = {}

    @property
    def backend(self) -> str:
        """The watched backend, or "" while the request has none."""
        return self._backend

    def settle_in(self, state: State, request: Request) -> None:
        """Watch the request's current backend, unless it is watched already."""
        if request.version == self._version and (request.backend or "") == self._backend:
            return
        self._version, self._backend = request.version, request.backend or ""
        self.look_anew(state)

    def look_anew(self, state: State) -> None:
        """Take the current state as the base of comparison, without counting changes that were not seen."""
        backend = state.backends.get(self._backend)
        if backend is None:
            self._key = ""
            return
        self._key = state.packed_for(self._version, backend).key if self._version != BASE else ""
        self._slots = dict.fromkeys(backend.slots)
        self._held = dict.fromkeys(backend.shadow.host.held)
        load = state.versions[self._version].loads.get(self._backend) if self._version != BASE else None
        if load is not None:
            self._loads[load] = None

    # Moments.

    def of_event(self, event: ev.Event) -> Iterator[Told]:
        """Yield the moments of an event that concerns the request."""
        if isinstance(event, ev.Fetched) and event.key == self._key:
            yield saying.FETCHED
        elif isinstance(event, ev.FetchFailed) and event.key == self._key:
            yield saying.fetch_failed(event)
        elif isinstance(event, ev.LoadDone) and event.load in self._loads:
            yield saying.loaded(event, self._backend)
        elif isinstance(event, ev.LoadFailed) and event.load in self._loads:
            yield saying.load_failed(event)
        elif isinstance(event, saying.Standing) and self._backend in ("", event.backend):  # "" is any
            yield saying.standing(event)

    def of_effect(self, effect: do.Effect, step: Replayed) -> Iterator[Told]:
        """Yield the moments of an effect that concerns the request."""
        if isinstance(effect, do.Fetch) and effect.key == self._key:
            yield saying.fetch(effect, sum(isinstance(other, do.Drop) for other in step.effects))
        elif isinstance(effect, do.Drop) and effect.key == self._key:
            yield saying.DROPPED
        elif isinstance(effect, do.Load) and effect.digest == self._version and effect.backend == self._backend:
            self._loads[effect.load] = None
            yield saying.load(effect)
        elif isinstance(effect, do.Heal) and effect.backend == self._backend and effect.version == self._version:
            if self._version != BASE and not isinstance(step.event, ev.LoadFailed):
                yield saying.heal(effect)
        elif isinstance(effect, do.Quarantine) and self._version.startswith(effect.digest):
            yield saying.quarantine(effect)

    # Counts.

    def count_effect(self, effect: do.Effect, state: State, tally: Tally) -> None:
        """Count an effect for another request or version at this backend."""
        if isinstance(effect, do.Load) and effect.backend == self._backend and effect.digest != self._version:
            _count(tally.loaded, called(state, effect.digest, state.backends.get(effect.backend)))
        if not isinstance(effect, do.Dispatch) or effect.backend != self._backend:
            return
        _count(tally.sent, effect.name or "base model")
        tally.arrived_later += effect.request > self._request
        other = state.requests.get(effect.request)
        if other is not None and other.version == self._version:
            tally.own_version += 1
            if len(tally.own_version_ids) < IDS_KEPT_MAX:
                tally.own_version_ids.append(effect.request)

    def look(self, step: Replayed, state: State, tally: Tally) -> Iterator[Told]:
        """Compare the backend's slots and cache with the last ones; yield the moments of the request's version."""
        backend = state.backends.get(self._backend)
        if backend is None:
            return
        if backend.slots.keys() != self._slots.keys():
            yield from self._slots_changed(state, backend, tally)
        if isinstance(step.event, _CHANGES_THE_CACHE):
            yield from self._cache_changed(state, backend, tally)

    def _slots_changed(self, state: State, backend: Backend, tally: Tally) -> Iterator[Told]:
        before, self._slots = self._slots, dict.fromkeys(backend.slots)
        for version in self._slots:
            if version == self._version and version not in before:
                yield "opened", f"its version was opened on {backend.id}"
            elif version not in before:
                _count(tally.opened, called(state, version, backend))
        for version in before:
            if version == self._version and version not in self._slots:
                yield "closed", f"its version was closed on {backend.id}"
            elif version not in self._slots:
                _count(tally.closed, called(state, version, backend))

    def _cache_changed(self, state: State, backend: Backend, tally: Tally) -> Iterator[Told]:
        before, self._held = self._held, dict.fromkeys(backend.shadow.host.held)
        for version in before:
            if eligibility.resident(backend, version):
                continue
            if version == self._version:
                yield "evicted", f"its version is believed to have left {backend.id}"
            else:
                _count(tally.evicted, called(state, version, backend))


def _count(names: dict[str, int], name: str) -> None:
    names[name] = names.get(name, 0) + 1


def may_concern(step: Replayed, state: State, backend: str) -> bool:
    """Return True if a step may have changed a reason to wait at a backend. `state` is the state after it."""
    if _backend_of(step, state) in ("", backend):
        return True
    # A fetch, a drop, a load, a heal, a timer: any of them may reach this backend.
    return not all(isinstance(effect, _LOCAL) and effect.backend not in ("", backend) for effect in step.effects)


def _backend_of(step: Replayed, state: State) -> str:
    """Return the backend of a step's event, or "" if it is unknown or there is none."""
    event = step.event
    if isinstance(event, _OF_A_BACKEND):
        return event.backend
    if not isinstance(event, _OF_A_REQUEST):
        return ""
    request = state.requests.get(event.request)
    if request is not None:
        return request.backend or ""
    return next((effect.backend for effect in step.effects if isinstance(effect, do.Settle)), "")


NOT_ARRIVED = ev.Received(0, "", "", "", 0, 0)


class Story:
    """Builds a timeline from the steps of a replay that concern one request."""

    def __init__(self, request: int) -> None:
        self.over = False
        self.known = False
        """True once the request has arrived."""
        self._request = request
        self._life = Life(NOT_ARRIVED)
        self._surroundings = Surroundings(request)
        self._sent_ns: int | None = None
        self._attempt = 0
        self._last_ns = 0

    @property
    def timeline(self) -> Timeline:
        return self._life.timeline

    # The journal's begin, gaps and end.

    def arrived_before(self, state: State) -> None:
        """Begin with a request that arrived before the first segment."""
        request = state.requests[self._request]
        view, at_ns = request.view, request.view.arrived_ns
        received = ev.Received(
            request.id, view.name, view.tenant, view.klass, view.input_tokens, view.output_tokens_max,
            request.deadline_ns, client_id=request.client_id,
        )  # fmt: skip
        self._life, self.known = Life(received, at_ns), True
        self._life.admitted(request)
        self._promised(request, at_ns)
        self._life.moment(at_ns, "arrived", "arrived before what is kept of the journal begins")
        self._life.begin(NOT_JOURNALED, at_ns, request.backend or "", "the journal begins later")
        self.resumed(state)

    def resumed(self, state: State) -> None:
        """Continue after steps that the journal left out."""
        request = state.requests.get(self._request)
        if request is None or request.settled or request.view.arrived_ns != self.timeline.arrived_ns:
            self._lost_sight("it ended in steps that the journal left out, so how it ended is not known")
            return
        if request.running and request.attempt != self._attempt:
            self._not_seen(request)
            self._life.end(request.dispatched_ns)
            self._life.moment(request.dispatched_ns, SENT, f"sent to {request.backend}")
            self._sent_ns, self._attempt = request.dispatched_ns, request.attempt
        elif not request.running:
            self._not_seen(request)
            self._sent_ns = None
        self._surroundings.settle_in(state, request)
        self._surroundings.look_anew(state)

    def _not_seen(self, request: Request) -> None:
        since_ns = self._last_ns if self._sent_ns is None else self._sent_ns
        if self._life.reason != NOT_JOURNALED:
            self._life.begin(NOT_JOURNALED, since_ns, request.backend or "", "the journal left steps out")

    def process_ended(self) -> None:
        """End the story: the next segment belongs to another life of the process, which does not know the request."""
        self._lost_sight("the process ended before it did, and the next one knew nothing of it")

    def _lost_sight(self, note: str) -> None:
        self.timeline.notes.append(note)
        self.over = True

    def finished(self) -> Timeline:
        """Return the timeline; a period that still lasts ends with the last step."""
        self._life.end(self._last_ns)
        if self.known and not self.over:
            doing = "waits" if self._sent_ns is None else "runs"
            self.timeline.notes.append(f"the journal ends while it {doing}")
        self._life.put_in_order()
        return self.timeline

    # Steps.

    def took(self, step: Replayed, state: State, routed: Sequence[Routed]) -> None:
        """Add one step; `state` is the state after it, `routed` the routing policy's choices for the request in it."""
        event, request = step.event, state.requests.get(self._request)
        if not self.known:
            if not (isinstance(event, ev.Received) and event.request == self._request):
                return
            self._arrives(event, step.at_ns, state, request)
        else:
            self._own_event(event, step.at_ns)
            if self._was_queued_again(step, request):
                self._queued_again(step.at_ns)
        for choice in routed:
            self._life.moment(step.at_ns, "routed", saying.routed(choice.choice, choice.candidates))
        was_at = self._surroundings.backend
        if request is not None:
            self._surroundings.settle_in(state, request)
            self._promised(request, step.at_ns)
        self._add_moments(step, state, was_at)
        if request is not None and not request.running and not self.over:
            self._ask_core(step, state, request)
        self._last_ns = step.at_ns

    def _arrives(self, event: ev.Received, now_ns: int, state: State, request: Request | None) -> None:
        self._life, self.known = Life(event, now_ns), True
        if request is not None:
            self._life.admitted(request)
            self._promised(request, request.view.arrived_ns)
        self._life.moment(now_ns, "arrived", saying.arrived(state, request))

    def _promised(self, request: Request, now_ns: int) -> None:
        """Keep the request's promise, and add a moment when it becomes void."""
        if request.promise is not None:
            self.timeline.promised_ns = request.promise.bound_ns
        self._life.voided(request.voided, now_ns)

    def _own_event(self, event: ev.Event, now_ns: int) -> None:
        if self._life.own_event(event, now_ns, self._attempt):
            return
        if self._life.reason or isinstance(event, saying.Standing):
            for what, text in self._surroundings.of_event(event):
                self._life.moment(now_ns, what, text)

    def _was_queued_again(self, step: Replayed, request: Request | None) -> bool:
        """Return True if a dispatched request went back to the queue in this step, even if it left again at once."""
        if self._sent_ns is None:
            return False
        if request is not None:
            return request.attempt != self._attempt or not (request.running or request.settled)
        waited_ns = self._sent_ns - self.timeline.arrived_ns
        return any(
            isinstance(effect, do.Settle) and effect.request == self._request and effect.queue_ns > waited_ns
            for effect in step.effects
        )

    def _queued_again(self, now_ns: int) -> None:
        assert self._sent_ns is not None
        self._life.failed(self._surroundings.backend, self._sent_ns, now_ns)
        self._life.moment(now_ns, *saying.QUEUED_AGAIN)
        self._sent_ns = None

    def _add_moments(self, step: Replayed, state: State, was_at: str) -> None:
        """Add moments for the step's effects, in order: effects before the request's own dispatch preceded it."""
        for effect in step.effects:
            if isinstance(effect, do.Settle) and effect.request == self._request:
                self._life.ended(effect, step.at_ns)
                self.over = True
                return
            if isinstance(effect, do.Dispatch) and effect.request == self._request:
                came_from = was_at if self._life.reason else ""
                self._life.end(step.at_ns)
                self._life.sent(effect, step.at_ns, came_from)
                self._sent_ns, self._attempt = step.at_ns, effect.attempt
            elif self._sent_ns is None:
                self._surroundings.count_effect(effect, state, self._life.tally)
                for what, text in self._surroundings.of_effect(effect, step):
                    self._life.moment(step.at_ns, what, text)

    def _ask_core(self, step: Replayed, state: State, request: Request) -> None:
        """Ask the core why the request waits, unless the step cannot have changed that."""
        backend = request.backend or ""
        waits = self._life
        if waits.reason and waits.backend == backend and not may_concern(step, state, backend):
            return
        for what, text in self._surroundings.look(step, state, waits.tally):
            waits.moment(step.at_ns, what, text)
        why = eligibility.why_waiting(state, request, step.at_ns)
        if why.value != waits.reason or backend != waits.backend:
            waits.begin(why.value, step.at_ns, backend, in_the_way(state, request, why, step.at_ns))
