"""The RPC `Access.GetUsage`."""

from __future__ import annotations

import sqlite3
from time import time
from typing import Any

from sidecar.access.access import Access
from sidecar.access.principal import Action
from sidecar.access.usage.keeper import UsageKeeper
from sidecar.access.usage.ledger import BY, Question, UsageTotal
from sidecar.access.usage.meter import OUTCOMES
from sidecar.errors import Misused, Reason, Refused
from sidecar.fronts.admin.own_tenant import confined_to
from sidecar.fronts.status import answers_errors
from sidecar.proto import admin_pb2

DAY_S = 86_400.0


class UsageCalls:
    """Shows what tenants have used; a part of `AccessService`. `usage` is None where none is kept."""

    def __init__(self, usage: UsageKeeper | None, access: Access) -> None:
        self._usage = usage
        self._access = access

    @answers_errors
    async def GetUsage(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self._usage is None:
            raise Misused(
                Reason.CONFIG_INVALID, "no usage is kept (access.usage.enabled: false); set it to true and restart"
            )
        unknown = [name for name in request.by if name not in BY]
        if unknown:
            raise Refused(Reason.INVALID_REQUEST, f'usage is not kept by "{unknown[0][:80]}"; it is by {", ".join(BY)}')
        until = request.until or time()
        since = request.since or until - DAY_S
        tenant = confined_to(self._access, Action.SHOW, request.tenant, context)
        question = Question(since, until, tuple(request.by), tenant or request.tenant, request.adapter)
        try:
            report = await self._usage.report(question)
        except sqlite3.Error as error:
            raise Refused(
                Reason.STATE_UNAVAILABLE,
                f"the file of usage cannot be read ({error}); move it away and restart, which begins a new one",
            ) from error
        return admin_pb2.UsageResponse(
            rows=[_row(line) for line in report.lines], incomplete=report.incomplete, note=report.note
        )


def _row(line: UsageTotal) -> Any:
    figures = line.figures
    row = admin_pb2.UsageRow(
        **line.keys,
        requests={outcome: int(figures[outcome]) for outcome in OUTCOMES if figures[outcome]},
        input_tokens=int(figures["input_tokens"]),
        output_tokens=int(figures["output_tokens"]),
        input_tokens_estimated=int(figures["input_tokens_estimated"]),
        output_tokens_estimated=int(figures["output_tokens_estimated"]),
        seat_seconds=figures["seat_s"],
        slot_seconds=figures["slot_s"],
        cold_loads=int(figures["loads"]),
        cold_load_bytes=int(figures["load_bytes"]),
        stored_byte_seconds=figures["stored_byte_s"],
        engine_seconds=figures["engine_s"],
    )
    setattr(row, "from", line.begins)
    return row
