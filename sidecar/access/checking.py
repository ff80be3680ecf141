"""Answer "may acme infer sql?" for a person: from the words of the question to the decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sidecar.access.principal import ROLES, SYSTEM, Action, Policy, Principal, Proof, Resource, Sort
from sidecar.access.resources import adapter_resource, version_resource
from sidecar.adapters.names import shown
from sidecar.errors import Reason, Refused
from sidecar.state.records import Record, Version

DIGEST_CHARACTERS_MIN = 8
OF_WHAT_IS_THERE = (Action.SHOW, Action.PROMOTE, Action.EVICT, Action.PAUSE)
"""What needs a name that the caller may see: else the admin listener says that there is none."""
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


@dataclass(frozen=True)
class Answer:
    """A decision. `version` is the version that it is about, as "v8"; "" if it is about the name as a whole."""

    allowed: bool
    by: str
    version: str = ""


HIDDEN = Answer(False, "there is no such name or version here that you may know of")


def principal_asked(tenant: str, groups: tuple[str, ...], roles: tuple[str, ...]) -> Principal:
    """Return the principal that a key of that tenant would prove. Raises Refused for a role that does not exist."""
    for role in roles:
        if role not in ROLES:
            raise Refused(Reason.INVALID_REQUEST, f"there is no role {shown(role)}; there are {', '.join(ROLES)}")
    return Principal(tenant, Proof.KEY, "", groups, roles)


def check(policy: Policy, known: Known, principal: Principal, action: str, name: str) -> Answer:
    """Decide as the sidecar would: to infer, both the name and the version that would answer have to be allowed.

    `action` is an action's word; `name` an adapter, "name@v8", "name@<digest>", a base model, a backend for "drain", or
    for "cancel", "see_queue" and "manage" a tenant, "" for all of them. Raises Refused for an unknown action or
    version.
    """

    def decide(asked: Action, resource: Resource) -> Answer:
        decision = policy.decide(principal, asked, resource)
        of_record = record is not None and resource.ordinal is not None
        return Answer(decision.allowed, decision.by, f"v{resource.ordinal}" if of_record else "")

    asked, record = _action(action), None
    if asked in TENANTS:
        return decide(asked, Resource(Sort.TENANT, name) if name else SYSTEM)
    if not name:
        raise Refused(Reason.INVALID_REQUEST, f'"{asked.value}" needs a name: an adapter, a base model or a backend')
    if asked is Action.DRAIN:
        return decide(asked, Resource(Sort.BACKEND, name))
    adapter, _, selector = name.partition("@")
    record = known.record_of(adapter)
    if record is None and known.is_base(name):
        return decide(asked, Resource(Sort.BASE, name))
    resource = replace(known.unregistered, name=adapter) if record is None else adapter_resource(record)
    if asked is Action.INFER_VERSION and not selector:
        raise Refused(Reason.INVALID_REQUEST, f'"{asked.value}" needs a version, as in "{shown(adapter)[1:-1]}@v8"')
    if asked in OF_WHAT_IS_THERE and not decide(Action.LIST, SYSTEM).allowed:
        seen = decide(Action.LIST, resource)
        if not seen.allowed:
            return seen
    is_inference = asked in (Action.INFER, Action.INFER_VERSION)
    answer = decide(Action.INFER if is_inference else asked, resource)
    if not answer.allowed or not (selector or is_inference):
        return answer
    version = _version(resource, record, selector)
    if is_inference:
        asked = Action.INFER if version.is_current else Action.INFER_VERSION
    return decide(asked, version)


def is_hidden(policy: Policy, known: Known, principal: Principal, action: str, name: str) -> bool:
    """Return True if a principal must not learn by asking whether there is that name, or that version of it.

    To register a name it need not be there, and the answer to that tells as much anyway.
    """
    asked = _action(action)
    if asked in (*TENANTS, Action.DRAIN, Action.REGISTER) or not name:
        return False

    def uses(resource: Resource, *actions: Action) -> bool:
        return any(policy.decide(principal, each, resource).allowed for each in actions)

    adapter, _, selector = name.partition("@")
    record = known.record_of(adapter)
    if record is None:
        return not known.is_base(name)
    if not uses(adapter_resource(record), Action.INFER, Action.LIST, Action.SHOW):
        return True
    if not selector:
        return False
    version = _selected(record, selector)
    if version is None:
        return True
    select = Action.INFER if version.ordinal == record.current else Action.INFER_VERSION
    return not uses(version_resource(record, version.ordinal), select, Action.LIST, Action.SHOW)


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
    version = _selected(record, selector)
    if version is not None:
        return version_resource(record, version.ordinal)
    has = ", ".join(f"v{version.ordinal}" for version in record.versions)
    raise Refused(
        Reason.UNKNOWN_ADAPTER,
        f'adapter "{record.name}" has no version {shown(selector)}; it has {has}',
        adapter=record.name,
    )


def _selected(record: Record, selector: str) -> Version | None:
    for version in reversed(record.versions):
        begins = len(selector) >= DIGEST_CHARACTERS_MIN and version.adapter.digest.startswith(selector)
        if begins or selector == f"v{version.ordinal}":
            return version
    return None
