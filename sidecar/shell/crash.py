"""End the process when its state may be half changed: at once, with all that is known logged and written.

The core, ownership and the code that runs effects change state as they go, so after an exception nothing is certain.
Nothing continues: the first exception is the last event, and all that follows is the ending.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from sidecar.backends.api import Ticket
from sidecar.core import causes
from sidecar.core.causes import Cause
from sidecar.core.effects import Settle
from sidecar.core.enums import outcome_of
from sidecar.core.state import State
from sidecar.errors import Failed, Reason, Refused
from sidecar.journal.raised import Raised

logger = logging.getLogger(__name__)


class Crash:
    """Whether the process has crashed, the actions to take then, and the last bound of every end."""

    def __init__(self) -> None:
        self.raised: Raised | None = None
        self.within: Callable[[float], None] = lambda seconds: None
        """Has the process end within some seconds, whatever hangs in it."""
        self._then: list[Callable[[Raised], None]] = []

    def then(self, do: Callable[[Raised], None]) -> None:
        """Register an action for the crash. Actions run in order on the event loop's thread and must not wait."""
        self._then.append(do)

    def happen(self, raised: Raised) -> None:
        """End the process. Only the first exception counts: later ones may be its consequences."""
        if self.raised is not None:
            return
        self.raised = raised
        logger.critical("the sidecar ends: %s; it must be restarted", raised.sentence, exc_info=raised.error)
        for do in self._then:
            try:
                do(raised)
            except Exception:  # the other actions must still run
                logger.exception("a part of the ending failed")

    def error(self) -> Failed:
        """Return the error for a caller whose own event raised, or came too late."""
        assert self.raised is not None
        return Failed(Reason.SIDECAR_FAILED, f"the sidecar has failed and ends: {self.raised.sentence}")

    def refused(self) -> Refused:
        """Return the refusal of a request that comes after the crash."""
        return Refused(Reason.DRAINING, "the sidecar has failed and ends; send the request again", retry_after_s=1.0)


def last_ending(ticket: Ticket, raised: Raised, state: State, owners: Sequence[str]) -> Settle:
    """Return the ending of a request that is open when the process crashes.

    `owners` are the replicas that may have crashed on it before. The request on which this process crashed must not be
    sent again. If that is unknown, neither must one that was with another replica when that crashed.
    """
    reason, cause = _why(ticket, raised, owners)
    known, facts, dispatch = state.requests.get(ticket.request), ticket.facts, ticket.dispatch
    return Settle(
        ticket.request,
        outcome_of(reason),
        "" if known is None else known.view.name,
        facts.tenant,
        facts.klass if facts.klass in state.config.classes else "default",
        0,
        facts.input_tokens,
        ticket.tokens,
        reason=reason,
        cause=cause,
        backend="" if dispatch is None else dispatch.backend,
    )


def _why(ticket: Ticket, raised: Raised, owners: Sequence[str]) -> tuple[Reason, Cause] | tuple[None, None]:
    if ticket.came is not None and ticket.came.final:
        return None, None
    if ticket.request == raised.request:
        return Reason.SIDECAR_FAILED, causes.SidecarFailed(ticket.client_id[:128], type(raised.error).__name__)
    if ticket.came is not None:
        return Reason.BACKEND_FAILED, causes.Crashed(answering=True)
    if owners and raised.request is None:
        return Reason.POISONOUS, causes.Poisonous(ticket.client_id[:128], (*owners, "this one"))
    return Reason.CRASHED, causes.Crashed(answering=False)
