"""How a process ends whose state may be half changed: at once, and with what is known said and written down.

The core, ownership and what carries out effects change state as they go, so after an exception nobody can say what
holds. Nothing goes on from there: the first exception is the last thing that happens, everything else is ending.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from sidecar.backends.api import Ticket
from sidecar.core.effects import Settle
from sidecar.core.enums import outcome_of
from sidecar.core.state import State
from sidecar.errors import Failed, Reason, Refused
from sidecar.journal.raised import Raised

logger = logging.getLogger(__name__)


class Crash:
    """Whether it has happened, and what is done then."""

    def __init__(self) -> None:
        self.raised: Raised | None = None
        self._then: list[Callable[[Raised], None]] = []

    def then(self, do: Callable[[Raised], None]) -> None:
        """Have something done when it happens, in order and on the event loop's own thread; it must not wait."""
        self._then.append(do)

    def happen(self, raised: Raised) -> None:
        """End. Only the first exception counts: those that follow may be its consequences."""
        if self.raised is not None:
            return
        self.raised = raised
        logger.critical("the sidecar ends: %s; it must be started anew", raised.words, exc_info=raised.error)
        for do in self._then:
            try:
                do(raised)
            except Exception:  # the others must be done all the same
                logger.exception("a part of the ending failed")

    def error(self) -> Failed:
        """Return what a caller is told whose own event raised, or came too late."""
        assert self.raised is not None
        return Failed(Reason.SIDECAR_FAILED, f"the sidecar has failed and ends: {self.raised.words}")

    def refused(self) -> Refused:
        """Return what a request is told that comes now."""
        return Refused(Reason.DRAINING, "the sidecar has failed and ends; send the request again", retry_after_s=1.0)


def last_ending(ticket: Ticket, raised: Raised, state: State, owners: Sequence[str]) -> Settle:
    """Return how a request ends that is open when the process does.

    `owners` are the replicas that may have ended of it before. The request that it happened with is not to be sent
    again. Where nobody can say with which one it happened, nor is one that was with two replicas when they ended.
    """
    reason, message = _why(ticket, raised, owners)
    known = state.requests.get(ticket.request)
    dispatch = ticket.dispatch
    return Settle(
        ticket.request,
        outcome_of(reason),
        "" if known is None else known.view.name,
        "" if known is None else known.view.tenant,
        "default" if known is None else known.view.klass,
        0,
        0 if known is None else known.view.input_tokens,
        reason=reason,
        message=message,
        backend="" if dispatch is None else dispatch.backend,
    )


def _why(ticket: Ticket, raised: Raised, owners: Sequence[str]) -> tuple[Reason | None, str]:
    if ticket.came is not None and ticket.came.final:
        return None, ""
    if ticket.request == raised.request:
        return Reason.SIDECAR_FAILED, (
            f"the sidecar failed on this request{_named(ticket)}, with {type(raised.error).__name__}, and ends; do not "
            "send it again as it is: it may end the next one too. The sidecar's log and journal say more"
        )
    if ticket.came is not None:
        return Reason.BACKEND_FAILED, (
            "the sidecar failed in the middle of the answer, on something else; an answer that has begun is never "
            "repeated, so send the request again if you want a new one"
        )
    if owners and raised.request is None:
        return Reason.POISONOUS, poisonous(ticket, (*owners, "this one"))
    return Reason.CRASHED, "the sidecar failed before anything of the answer had come; send the request again"


def poisonous(ticket: Ticket, owners: Sequence[str]) -> str:
    """Say why a request is given to no further replica."""
    return (
        f"this request{_named(ticket)} was with each of the replicas {', '.join(owners)} when that ended, and may be "
        "why; it is given to no other one. Their logs say what they ended of"
    )


def _named(ticket: Ticket) -> str:
    return f" ({ticket.client_id[:128]})" if ticket.client_id else ""
