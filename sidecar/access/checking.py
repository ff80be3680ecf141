"""Answer "may acme infer sql?" for a person: from the words of the question to the decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sidecar.access.principal import ROLES, SYSTEM, Action, Policy, Principal, Proof, Resource, Sort
from sidecar.access.resources import adapter_resource, version_resource
from sidecar.adapters.names import shown
from sidecar.errors import Reason, Refused
from sidecar.model.reference import Reference
from sidecar.state.records import Record

INFERENCE_ACTIONS = (Action.INFER, Action.INFER_VERSION)
OF_WHAT_IS_THERE = (Action.SHOW, Action.PROMOTE, Action.EVICT, Action.PAUSE)
"""What needs a name that the caller may see: else the admin listener says that there is none."""
TENANTS = (Action.CANCEL, Action.SEE_QUEUE, Action.MANAGE)
"""Actions on a tenant's requests, or with no name on everybody's."""

ANY = Resource(Sort.ADAPTER)


@dataclass(frozen=True)
class Known:
    """What is known of names. `record_of` returns a name's record, `is_base` tells the names of base models.

    `unregistered` is what a name without a record is taken for. In what a principal may know of, `whole` is all that is
    known; else it is None.
    """

    record_of: Callable[[str], Record | None]
    is_base: Callable[[str], bool]
    unregistered: Resource = ANY
    whole: Known | None = None


@dataclass(frozen=True)
class Answer:
    """A decision. `version` is the version that it is about, as "v8"; "" if it is about the name as a whole."""

    allowed: bool
    by: str
    version: str = ""


HIDDEN = Answer(False, "visibility: the name or version is not here, or hidden from you")


def principal_asked(tenant: str, groups: tuple[str, ...], roles: tuple[str, ...]) -> Principal:
    """Return the principal that a key of that tenant would prove. Raises Refused for a role that does not exist."""
    for role in roles:
        if role not in ROLES:
            raise Refused(Reason.INVALID_REQUEST, f"there is no role {shown(role)}; there are {', '.join(ROLES)}")
    return Principal(tenant, Proof.KEY, "", groups, roles)


def seen_by(policy: Policy, known: Known, principal: Principal) -> Known:
    """Return what a principal may know of: the names that a list shows it, and those that it may infer with."""

    def may_know(resource: Resource) -> bool:
        return any(policy.decide(principal, action, resource).allowed for action in (Action.LIST, Action.INFER))

    def record_of(name: str) -> Record | None:
        record = known.record_of(name)
        if record is None or policy.decide(principal, Action.LIST, SYSTEM).allowed:
            return record
        return record if may_know(adapter_resource(record)) else None

    def is_base(name: str) -> bool:
        is_adapter = known.record_of(name) is not None  # a request for it means the adapter, hidden or not
        return not is_adapter and known.is_base(name) and may_know(Resource(Sort.BASE, name))

    return Known(record_of, is_base, known.unregistered, known)


def check(policy: Policy, known: Known, principal: Principal, action: str, name: str) -> Answer:
    """Decide as the sidecar would: to infer, both the name and a version that would answer have to be allowed.

    `action` is an action's word; `name` an adapter, "name@v8", "name@<digest>", a base model, a backend for "drain", or
    for "cancel", "see_queue" and "manage" a tenant, "" for all of them. If `known` is what the principal may know of
    (`seen_by`), the answer tells what the action itself would tell, and what is hidden answers as what is not there.
    Raises Refused for a question that makes no sense, or for an unknown version.
    """
    return _Asking(policy, known, principal).answer(_asked(action, name), name)


@dataclass(frozen=True)
class _Asking:
    policy: Policy
    known: Known
    principal: Principal

    def answer(self, asked: Action, name: str) -> Answer:
        if asked in TENANTS:
            return self._decide(asked, Resource(Sort.TENANT, name) if name else SYSTEM)
        if asked is Action.DRAIN:
            return self._decide(asked, Resource(Sort.BACKEND, name))
        adapter, selector = Reference.of(name)
        record = self.known.record_of(adapter)
        resource = replace(self.known.unregistered, name=adapter) if record is None else adapter_resource(record)
        if asked is Action.REGISTER:
            return self._to_register(resource)
        if record is None and self.known.is_base(name):
            return self._decide(asked, Resource(Sort.BASE, name))
        if record is None and self.known.whole is not None:
            return HIDDEN
        if asked in OF_WHAT_IS_THERE and not self._decide(Action.LIST, SYSTEM).allowed:
            seen = self._decide(Action.LIST, resource)
            if not seen.allowed:
                return seen
        of_name = self._decide(Action.INFER if asked in INFERENCE_ACTIONS else asked, resource)
        if not of_name.allowed or not (selector or asked in INFERENCE_ACTIONS):
            return of_name
        if record is None:
            number = selector.removeprefix("v")
            ordinal = int(number) if number.isdecimal() and len(number) < 10 else None
            version = replace(resource, sort=Sort.VERSION, ordinal=ordinal, is_current=not selector)
            return self._decide(_on_version(asked, version, selector), version)
        return self._of_version(asked, record, selector, of_name)

    def _decide(self, asked: Action, resource: Resource) -> Answer:
        decision = self.policy.decide(self.principal, asked, resource)
        return Answer(decision.allowed, decision.by)

    def _to_register(self, resource: Resource) -> Answer:
        """Decide as `Register` does, which takes a name that is hidden for what it is.

        Why it does so tells that the name is there, unless a name that is not there has the same answer.
        """
        answer = self._decide(Action.REGISTER, resource)
        record = None if self.known.whole is None else self.known.whole.record_of(resource.name)
        if record is None:
            return answer
        real = self._decide(Action.REGISTER, adapter_resource(record))
        if real.allowed == answer.allowed:
            return answer
        return real if real.allowed else HIDDEN

    def _of_version(self, asked: Action, record: Record, selector: str, of_name: Answer) -> Answer:
        """Decide about the version that is selected, else about the current one, or the canary if only that may answer.

        A version that the principal may not list is not told, nor why it is denied: the rule may tell what it is.
        """
        hides = self.known.whole is not None
        ordinals = self._selected(record, selector) if selector else [record.current, *(record.canary or ())[:1]]
        versions = [version_resource(record, ordinal) for ordinal in ordinals]
        judged = [(self._decide(_on_version(asked, version, selector), version), version) for version in versions]
        if not judged:
            return HIDDEN
        answer, version = next((each for each in judged if each[0].allowed), judged[0])
        if not hides or self._decide(Action.LIST, version).allowed:
            return replace(answer, version=f"v{version.ordinal}")
        return of_name if answer.allowed and asked in INFERENCE_ACTIONS else HIDDEN

    def _selected(self, record: Record, selector: str) -> list[int]:
        """Return the ordinal that a selector names, nothing for an unknown one that is not to be told.

        Raises Refused(UNKNOWN_ADAPTER).
        """
        version = record.selected(selector)
        if version is not None:
            return [version.ordinal]
        if self.known.whole is not None:
            return []
        has = ", ".join(f"v{version.ordinal}" for version in record.versions)
        raise Refused(
            Reason.UNKNOWN_ADAPTER,
            f'adapter "{record.name}" has no version {shown(selector)}; it has {has}',
            adapter=record.name,
        )


def _asked(word: str, name: str) -> Action:
    """Return the action that is asked about. Raises Refused for a question that makes no sense for any name."""
    try:
        asked = Action(word)
    except ValueError:
        words = ", ".join(action.value for action in Action)
        raise Refused(Reason.INVALID_REQUEST, f"there is no action {shown(word)}; there are {words}") from None
    adapter, selector = Reference.of(name)
    if not name and asked not in TENANTS:
        raise Refused(Reason.INVALID_REQUEST, f'"{word}" needs a name: an adapter, a base model or a backend')
    if asked is Action.INFER_VERSION and not selector:
        raise Refused(Reason.INVALID_REQUEST, f'"{word}" needs a version, as in "{shown(adapter)[1:-1]}@v8"')
    if asked is Action.REGISTER and "@" in name:
        raise Refused(
            Reason.INVALID_REQUEST, f'"{word}" needs a name without a version: {shown(adapter)}; it makes the next one'
        )
    return asked


def _on_version(asked: Action, version: Resource, selector: str) -> Action:
    if asked not in INFERENCE_ACTIONS:
        return asked
    return Action.INFER_VERSION if selector and not version.is_current else Action.INFER
