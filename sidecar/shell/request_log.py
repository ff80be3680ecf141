"""Log one line for each request at its end: where the answer came from, how long it took, what went wrong.

It replaces an access log. It holds ids, names, lengths and times only: no prompt and no token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from sidecar.core.effects import Effect, Heal, Quarantine, Settle
from sidecar.core.enums import Outcome
from sidecar.core.events import BackendLost, Event
from sidecar.errors import Reason, SidecarError
from sidecar.shell.logs import Fields
from sidecar.telling.endings import message_of, quarantined
from sidecar.telling.record import Record

requests = logging.getLogger("sidecar.requests")
logger = logging.getLogger(__name__)


class RequestLog:
    """Logs requests as they end, as `Chronicle.on_end` tells, and as an observer lost backends and quarantines.

    A failed request, and one that a shutdown cut off, is a warning. `label` returns the name of a version for people.
    That a backend is up its own module logs, which knows more of it.
    """

    def __init__(self, label: Callable[[str], str]) -> None:
        self._label = label

    def observed(self, event: Event, effects: Sequence[Effect], now_ns: int) -> None:
        if isinstance(event, BackendLost) and any(isinstance(effect, Heal) for effect in effects):
            logger.warning("backend %s is lost: %s", event.backend, event.cause)
        for effect in effects:
            if isinstance(effect, Quarantine):
                why = quarantined(effect.suspicion)
                logger.warning(
                    "%s is quarantined: %s (version %s)", self._label(effect.digest), why, effect.digest[:12]
                )

    def ended(self, record: Record) -> None:
        """Log the ending of a request of this replica's core; the replica that answers another one logs that."""
        settle = record.settle
        if settle is None or record.is_elsewhere:
            return
        was_taken = record.dispatch is not None or settle.queue_ns > 0
        is_cut_off = settle.reason is Reason.DRAINING and was_taken
        level = logging.WARNING if settle.outcome is Outcome.FAILED or is_cut_off else logging.INFO
        if requests.isEnabledFor(level):
            requests.log(level, ending_fields(record, settle))


def log_refused(client_id: str, error: SidecarError) -> None:
    """Log a request that a front has refused: the core never hears of it, so it has no number."""
    if requests.isEnabledFor(logging.INFO):
        requests.info(
            Fields("request ended", id=client_id, outcome="refused", reason=error.reason.value, error=error.message)
        )


def ending_fields(record: Record, settle: Settle) -> Fields:
    """Return a request's log line."""
    dispatch, ordinal = record.dispatch, record.ordinal
    if dispatch is not None and dispatch.name:
        ordinal = dispatch.ordinal
    values: dict[str, Any] = {
        "request": settle.request,
        "id": record.client_id,
        "outcome": settle.outcome.value,
        "reason": settle.reason.value if settle.reason is not None else "",
        "adapter": settle.name,
        "version": f"v{ordinal}" if ordinal else settle.version[:12],
        "backend": dispatch.backend if dispatch is not None else "",
        "tenant": settle.tenant,
        "peer": record.peer,
        "lane": "envoy" if record.is_carried else "path",
        "class": settle.klass,
        "cache": dispatch.cache.value if dispatch is not None else "",
        "queue_ms": round(settle.queue_ns / 1e6, 3),
        "bound_ms": round(settle.bound_ns / 1e6, 3) if settle.bound_ns is not None else None,
        "voided": settle.voided.value if settle.voided is not None else "",
        "load_ms": round(dispatch.load_ns / 1e6, 3) if dispatch is not None else 0.0,
        "heals": dispatch.heals if dispatch is not None else 0,
        "input_tokens": settle.input_tokens,
        "output_tokens": settle.output_tokens,
        "estimated": settle.is_estimated,
    }
    if settle.reason is not None:
        values["error"] = message_of(settle)
    return Fields("request ended", **values)
