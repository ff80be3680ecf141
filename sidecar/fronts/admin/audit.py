"""Answer `Access.ReadAudit` and `Access.WhoAmI`."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import Any

from sidecar.access.audit import Audit
from sidecar.access.policy import Roles
from sidecar.errors import Misused, Reason, Refused, SidecarError
from sidecar.fronts import callers
from sidecar.fronts.status import abort, answers_errors
from sidecar.proto import admin_pb2
from sidecar.proto.filling import filled

LINES_AT_ONCE = 500
KINDS = ("", "change", "denial")


class AuditCalls:
    """Reads the audit, and tells callers who they are; a part of `AccessService`.

    `roles` knows the roles that the configuration gives to tenants and groups.
    """

    def __init__(self, audit: Audit, roles: Roles) -> None:
        self._audit = audit
        self._roles = roles

    async def ReadAudit(self, request: Any, context: Any) -> None:  # noqa: N802 — gRPC's names, here and below
        """Stream the lines, the newest last. A thread reads them: there may be many megabytes."""
        try:
            lines = self._lines(request)
            await asyncio.to_thread(self._audit.log.flush, 1.0)
            while batch := await asyncio.to_thread(lambda: list(islice(lines, LINES_AT_ONCE))):
                for line in batch:
                    await context.write(admin_pb2.AuditLine(json=line))
        except SidecarError as error:
            await abort(context, error)

    def _lines(self, request: Any) -> Any:
        if request.kind not in KINDS:
            raise Refused(Reason.INVALID_REQUEST, f'kind is "{request.kind[:80]}"; it must be change, denial or empty')
        if not self._audit.is_readable:
            raise Misused(
                Reason.CONFIG_INVALID,
                "the audit is kept in no file of this sidecar: it goes to stdout or into the log; look where they are "
                "collected, or set access.audit.file",
            )
        return self._audit.read(request.since, request.adapter, request.tenant, request.kind)

    @answers_errors
    async def WhoAmI(self, request: Any, context: Any) -> Any:  # noqa: N802
        who = callers.CALLER.get().principal
        roles = sorted(self._roles.of(who))
        return filled(admin_pb2.WhoAmIResponse, who, proof=who.proof.value, roles=roles)
