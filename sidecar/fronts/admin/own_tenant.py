"""Confine callers that may not see everything to what is their own tenant's."""

from __future__ import annotations

from typing import Any

from sidecar.access.access import Access
from sidecar.access.principal import Action, Resource, Sort
from sidecar.config.identities import clipped
from sidecar.errors import Reason, Refused
from sidecar.fronts import callers
from sidecar.fronts.admin.guard import DOING


def confined_to(access: Access, action: Action, asked: str, context: Any) -> str | None:
    """Return the tenant that the caller of an RPC is confined to, None for any; without `asked` its own.

    Raises Refused(NOT_ALLOWED) if the caller may not act on the tenant that it asks for. In observe mode that is only
    recorded, and nobody is confined.
    """
    caller = callers.CALLER.get()
    principal = access.judged(caller)
    if principal is None or access.decide(principal, action).allowed:
        return None
    is_enforced = access.mode == "enforce"
    resource = Resource(Sort.TENANT, asked or principal.tenant)
    decision = access.decide(principal, action, resource)
    if decision.allowed and resource.name:
        return resource.name if is_enforced else None
    request_id = callers.id_of_call(context)
    access.denied(caller, action, resource, decision.by, request_id)
    if not is_enforced:
        return None
    what = f'what is of tenant "{clipped(resource.name)}"' if resource.name else "what is of all tenants"
    raise Refused(
        Reason.NOT_ALLOWED,
        f'you may not {DOING.get(action, action.value)} {what}; ask your operator with id "{request_id}"',
    )
