"""Follow one request through a replay, step by step, until it ends.

Every instant between its arrival and its last dispatch belongs to exactly one period: waiting for a reason, at an
engine in vain, or not journaled.
"""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.core import effects as do
from sidecar.core import eligibility
from sidecar.core import events as ev
from sidecar.core.state import Request, State
from sidecar.incident.surroundings import Surroundings, may_concern
from sidecar.incident.witness import Routed
from sidecar.journal.replay import Replayed
from sidecar.telling import saying
from sidecar.telling.life import Life
from sidecar.telling.timeline import NOT_JOURNALED, SENT, Timeline
from sidecar.telling.waits import in_the_way

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
