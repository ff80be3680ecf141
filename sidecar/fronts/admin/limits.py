"""Answer `Access.SetLimit`, `Access.ListLimits` and `Access.RemoveLimit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ValidationError

from sidecar.access.access import Access
from sidecar.access.budgets.book import LimitBook
from sidecar.access.configured import unknown_class
from sidecar.access.principal import Action
from sidecar.config.access import Limit
from sidecar.config.identities import clipped
from sidecar.config.section import problems
from sidecar.errors import Reason, Refused
from sidecar.fronts import callers
from sidecar.fronts.admin.own_tenant import confined_to
from sidecar.fronts.status import answers_errors
from sidecar.proto import admin_pb2
from sidecar.state.records import Record

NUMBERS = tuple(
    field.name
    for field in admin_pb2.Limit.DESCRIPTOR.fields
    if field.type == field.TYPE_UINT64
)  # fmt: skip


class LimitCalls:
    """Sets, lists and removes limits, which may be for one of `classes`; a part of `AccessService`."""

    def __init__(
        self, book: LimitBook, access: Access, record_of: Callable[[str], Record | None], classes: Sequence[str]
    ) -> None:
        self._book = book
        self._access = access
        self._record_of = record_of
        self.classes = classes

    @answers_errors
    async def SetLimit(self, request: Any, context: Any) -> Any:  # noqa: N802 — gRPC's names, here and below
        numbers = {name: getattr(request, name) for name in NUMBERS if request.HasField(name)}
        klass = getattr(request, "class")
        if klass not in ("", "*", *self.classes):
            raise Refused(Reason.INVALID_REQUEST, unknown_class(clipped(klass), self.classes))
        try:
            limit = await self._book.set(*_words(request), numbers)
        except ValidationError as error:
            raise Refused(Reason.INVALID_REQUEST, "; ".join(problems(error, Limit))) from None
        [taken] = await self._book.taken([limit], limit.tenant or "")
        return _message(limit, True, taken)

    @answers_errors
    async def ListLimits(self, request: Any, context: Any) -> Any:  # noqa: N802
        own = confined_to(self._access, Action.SHOW, request.tenant, context)
        tenant = own or request.tenant
        listed = [
            (limit, at_run_time)
            for limit, at_run_time in self._book.in_force()
            if (not tenant or limit.tenant in (None, "*", tenant)) and (own is None or self._is_own(limit))
        ]
        taken = await self._book.taken([limit for limit, _ in listed], tenant)
        found = [_message(limit, at_run_time, each) for (limit, at_run_time), each in zip(listed, taken, strict=True)]
        return admin_pb2.ListLimitsResponse(limits=found)

    def _is_own(self, limit: Limit) -> bool:
        """Return True if a caller that sees its own tenant only may see a limit: others share those without a tenant,
        and one may be for an adapter that it may not see.
        """
        caller = callers.CALLER.get()
        if limit.tenant is None or limit.adapter in (None, "*"):
            return limit.tenant is not None
        record = self._record_of(limit.adapter)
        return record is not None and self._access.may_see(caller, caller.principal.tenant, record)

    @answers_errors
    async def RemoveLimit(self, request: Any, context: Any) -> Any:  # noqa: N802
        return _message(await self._book.remove(*_words(request)), True, {})


def _words(request: Any) -> tuple[str, str, str, str]:
    return request.tenant, getattr(request, "class"), request.adapter, request.tokens


def _message(limit: Limit, at_run_time: bool, taken: dict[str, int]) -> Any:
    message = admin_pb2.Limit(
        tenant=limit.tenant or "",
        adapter=limit.adapter or "",
        tokens=limit.tokens,
        source="run time" if at_run_time else "config",
        taken=taken,
        **{name: getattr(limit, name) for name in NUMBERS},
    )
    setattr(message, "class", limit.class_name or "")  # a keyword of Python's
    return message
