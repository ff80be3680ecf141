"""Answer `Access.Check`."""

from __future__ import annotations

from typing import Any

from sidecar.access.checking import Known, check, principal_asked
from sidecar.access.deciding import CachedPolicy
from sidecar.core.admission import BASE_NAMES
from sidecar.fronts import callers
from sidecar.fronts.eligible import base_names
from sidecar.fronts.status import answers_errors
from sidecar.proto import admin_pb2
from sidecar.shell.gateway import Gateway


class Checks:
    """Tells who may do what; a part of `AccessService`."""

    def __init__(self, policy: CachedPolicy, gateway: Gateway) -> None:
        self._policy = policy
        self._gateway = gateway
        self._known = Known(gateway.catalogue.registry.get, self._is_base)

    @answers_errors
    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.tenant or request.groups or request.roles:
            principal = principal_asked(request.tenant, tuple(request.groups), tuple(request.roles))
        else:
            principal = callers.CALLER.get().principal
        decision = check(self._policy, self._known, principal, request.action, request.resource)
        return admin_pb2.CheckResponse(
            allowed=decision.allowed, by=decision.by, source=self._policy.source, fault=self._policy.fault
        )

    def _is_base(self, name: str) -> bool:
        backends = self._gateway.state.backends.values()
        return name in BASE_NAMES or any(name in base_names(backend.facts) for backend in backends)
