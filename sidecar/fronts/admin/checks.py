"""Answer `Access.Check`."""

from __future__ import annotations

from time import time
from typing import Any

from sidecar.access.access import Caller
from sidecar.access.checking import HIDDEN, TENANTS, Answer, Known, check, principal_asked, seen_by
from sidecar.access.deciding import CachedPolicy
from sidecar.access.policy import READY
from sidecar.access.principal import SYSTEM, Action, Principal
from sidecar.backends.registry import is_base_model
from sidecar.errors import Reason, Refused
from sidecar.fronts import callers
from sidecar.fronts.status import answers_errors
from sidecar.model.reference import BASE_NAMES, Reference
from sidecar.proto import admin_pb2
from sidecar.proto.filling import filled
from sidecar.shell.gateway import Gateway
from sidecar.state.records import paused_for

UNKNOWN, PAUSED = "unknown", "paused"
FAULTY = "its file has a fault; ask your operator"


class Checks:
    """Tells who may do what; a part of `AccessService`.

    Everybody may ask about itself, and then learns of no name that is hidden from it.
    """

    def __init__(self, policy: CachedPolicy, gateway: Gateway) -> None:
        self._policy = policy
        self._gateway = gateway
        self._known = Known(gateway.catalogue.registry.get, self._is_base)

    @answers_errors
    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        caller, access, action, name = callers.CALLER.get(), self._gateway.access, request.action, request.resource
        principal, manages = self._asked_about(caller, request, callers.id_of_call(context))
        sees_all = manages or access.mode != "enforce"
        known = self._known if sees_all else seen_by(self._policy, self._known, principal)
        answer = check(self._policy, known, principal, action, name)
        if principal is caller.principal and caller.doubt:  # in observe mode
            answer = Answer(False, caller.doubt)
        if answer is HIDDEN:
            state = UNKNOWN
        else:
            state = self._state(known, action, name) if sees_all or answer.allowed else ""
        source, fault = self._policy.source, self._policy.fault
        if not manages:  # neither where the file is nor what is in it
            source = source if source in READY else "cedar"
            fault = FAULTY if fault else ""
        return filled(admin_pb2.CheckResponse, answer, source=source, fault=fault, name_state=state)

    def _asked_about(self, caller: Caller, request: Any, request_id: str) -> tuple[Principal, bool]:
        """Return whom a question is about, and whether the caller may ask about everybody and everything.

        Raises Refused(NOT_ALLOWED) if it may not and asks about others. In observe mode that is only recorded.
        """
        access = self._gateway.access
        judged = access.judged(caller)
        itself = judged or caller.principal
        decision = access.decide(itself, Action.MANAGE)
        manages = decision.allowed or judged is None
        # To who does not manage access, its tenant is itself: without its groups it would be one that may see more.
        of_itself = not (request.groups or request.roles) and request.tenant in ("", "" if manages else itself.tenant)
        asked = principal_asked(request.tenant, tuple(request.groups), tuple(request.roles))
        if of_itself:
            return itself, manages
        if not manages:
            access.denied(caller, Action.MANAGE, SYSTEM, decision.by, request_id, "Access.Check")
            if access.mode == "enforce":
                raise Refused(
                    Reason.NOT_ALLOWED,
                    "you may ask about yourself only: leave out tenant, groups and roles (--as, --group, --role); or "
                    f'ask your operator with id "{request_id}"',
                )
        return asked, manages

    def _state(self, known: Known, action: str, name: str) -> str:
        """Return what a request for the name would meet besides the policy."""
        if Action(action) in TENANTS:
            return ""
        if action == Action.DRAIN.value:
            return "" if name in self._gateway.state.backends else UNKNOWN
        record = known.record_of(Reference.of(name).name)
        if record is None:
            return "" if known.is_base(name) else UNKNOWN
        return "" if paused_for(record, time()) is None else PAUSED

    def _is_base(self, name: str) -> bool:
        return name in BASE_NAMES or is_base_model(self._gateway.state, name)
