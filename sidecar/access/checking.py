"""Answer "may acme infer sql?" for a person: from the words of the question to the decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sidecar.access.principal import SYSTEM, Action, Decision, Policy, Principal, Proof, Resource, Sort
from sidecar.access.resources import adapter_resource, version_resource
from sidecar.adapters.names import shown
from sidecar.errors import Reason, Refused
from sidecar.state.records import Record

DIGEST_CHARACTERS_MIN = 8
TENANTS = (Action.CANCEL, Action.SEE_QUEUE, Action.MANAGE)
"""Actions on a tenant's requests, or with no name on everybody's."""


ANY = Resource(Sort.ADAPTER)


@dataclass(frozen=True)
class Known:
    """What is known of names. `record_of` returns a name's record, `is_base` tells the names of base models.

    `unregistered` is what a name without a record is taken for.
    """

    record_of: Callable[[str], Record | None]
    is_base: Callable[[str], bool]
    unregistered: Resource = ANY


def principal_asked(tenant: str, groups: tuple[str, ...], roles: tuple[str, ...]) -> Principal:
    """Return the principal that a key of that tenant would prove."""
    return Principal(tenant, Proof.KEY, "", groups, roles)


def check(policy: Policy, known: Known, principal: Principal, action: str, name: str) -> Decision:
    """Decide as the sidecar would: to infer, both the name and the version that would answer have to be allowed.

    `action` is an action's word; `name` an adapter, "name@v8", "name@<digest>", a base model, a backend for "drain", or
    for "cancel", "see_queue" and "manage" a tenant, "" for all of them. Raises Refused for an unknown action or
    version.
    """
    asked: Action = _action(action)
    if asked in TENANTS:
        return policy.decide(principal, asked, Resource(Sort.TENANT, name) if name else SYSTEM)
    if not name:
        raise Refused(Reason.INVALID_REQUEST, f'"{asked.value}" needs a name: an adapter, a base model or a backend')
    if asked is Action.DRAIN:
        return policy.decide(principal, asked, Resource(Sort.BACKEND, name))
    adapter, _, selector = name.partition("@")
    record = known.record_of(adapter)
    if record is None and known.is_base(name):
        return policy.decide(principal, asked, Resource(Sort.BASE, name))
    resource = replace(known.unregistered, name=adapter) if record is None else adapter_resource(record)
    if asked is Action.INFER_VERSION and not selector:
        raise Refused(Reason.INVALID_REQUEST, f'"{asked.value}" needs a version, as in "{shown(adapter)[1:-1]}@v8"')
    is_inference = asked in (Action.INFER, Action.INFER_VERSION)
    decision = policy.decide(principal, Action.INFER if is_inference else asked, resource)
    if not decision.allowed or not (selector or is_inference):
        return decision
    version = _version(resource, record, selector)
    if is_inference:
        asked = Action.INFER if version.is_current else Action.INFER_VERSION
    return policy.decide(principal, asked, version)


def _action(word: str) -> Action:
    try:
        return Action(word)
    except ValueError:
        words = ", ".join(action.value for action in Action)
        raise Refused(Reason.INVALID_REQUEST, f"there is no action {shown(word)}; there are {words}") from None


def _version(resource: Resource, record: Record | None, selector: str) -> Resource:
    """Return the version that a selector names, the current one without. Raises Refused(UNKNOWN_ADAPTER)."""
    if record is None:
        number = selector.removeprefix("v")
        ordinal = int(number) if number.isdecimal() and len(number) < 10 else None
        return replace(resource, sort=Sort.VERSION, ordinal=ordinal, is_current=not selector)
    if not selector:
        return version_resource(record, record.current)
    for version in reversed(record.versions):
        begins = len(selector) >= DIGEST_CHARACTERS_MIN and version.adapter.digest.startswith(selector)
        if begins or selector == f"v{version.ordinal}":
            return version_resource(record, version.ordinal)
    has = ", ".join(f"v{version.ordinal}" for version in record.versions)
    raise Refused(
        Reason.UNKNOWN_ADAPTER,
        f'adapter "{record.name}" has no version {shown(selector)}; it has {has}',
        adapter=record.name,
    )
