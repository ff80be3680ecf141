"""Assemble the timeline of a request's life, from a journal's steps or from what the live process has kept."""

from __future__ import annotations

from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.enums import Voided
from sidecar.core.state import Request
from sidecar.telling import saying
from sidecar.telling.endings import message_of
from sidecar.telling.timeline import AT_AN_ENGINE, SENT, Timeline, Waits

UNTOLD = "its client has the message"
"""In place of why it ended, for whoever may not hear of other adapters and engines."""


class Life(Waits):
    """One request's life. Whoever follows the request says what happened to it, in order."""

    def __init__(self, received: ev.Received, arrived_ns: int = 0) -> None:
        super().__init__(Timeline(received, arrived_ns, reserved_tokens=received.output_tokens_max))

    def admitted(self, request: Request) -> None:
        """Take over what the core has made of a request."""
        line, view = self.timeline, request.view
        line.version, line.ordinal, line.reserved_tokens = view.version, request.ordinal, view.output_tokens_max
        line.expires_after_ns = request.expires_ns - view.arrived_ns

    def own_event(self, event: ev.Event, at_ns: int, attempt: int) -> bool:
        """Add an event of the request itself; return False for any other event."""
        told = saying.own_event(event, self.timeline.received.request, attempt)
        if told is not None:
            self.moment(at_ns, *told)
        return told is not None

    def voided(self, why: Voided | None, at_ns: int) -> None:
        """Note that its promise is void, once."""
        if why is not None and not self.timeline.voided:
            self.timeline.voided = why.value
            self.moment(at_ns, *saying.voided(why))

    def sent(self, dispatch: do.Dispatch, at_ns: int, came_from: str) -> None:
        """Note a dispatch; `came_from` is the other backend in whose queue it had waited, "" for none."""
        if came_from not in ("", dispatch.backend):
            self.moment(at_ns, *saying.taken_over(came_from, dispatch))
        self.moment(at_ns, SENT, saying.sent(dispatch))

    def failed(self, backend: str, since_ns: int, at_ns: int) -> None:
        """Note that an engine had it in vain since it was sent."""
        self.begin(AT_AN_ENGINE, since_ns, backend, saying.IN_VAIN)
        self.end(at_ns)

    def ended(self, settle: do.Settle, at_ns: int, is_told: bool = True) -> None:
        self.end(at_ns)
        line = self.timeline
        line.message = message_of(settle) if is_told or settle.reason is None else UNTOLD
        self.moment(at_ns, "ended", saying.ended(settle, line.message))
        line.ended_ns, line.output_tokens, line.outcome = at_ns, settle.output_tokens, settle.outcome.value
        line.reason = "" if settle.reason is None else settle.reason.value
        line.voided = "" if settle.voided is None else settle.voided.value
