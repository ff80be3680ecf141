"""The three ready sets of policies: `open`, `tenant_prefix` and `roles`.

| who | `open` | `tenant_prefix` | `roles` |
|---|---|---|---|
| everybody | uses all names | uses names under its prefix, and those that a list shares | infers with all names |
| viewer | the same | the same | uses all names |
| publisher | also changes names | also changes names under its prefix | also changes names |
| operator | everything | everything | everything |

To use is to infer, to select a version, to list and to show; an allow list always restricts it. Everybody may use the
base model, and see the requests of its own tenant. A publisher may cancel these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from sidecar.access.principal import (
    OPERATOR,
    PUBLISHER,
    ROLES,
    VIEWER,
    Action,
    Decision,
    Principal,
    Proof,
    Resource,
    Sort,
)

USE = frozenset({Action.INFER, Action.INFER_VERSION, Action.LIST, Action.SHOW})
CHANGE = frozenset({Action.REGISTER, Action.PROMOTE, Action.EVICT, Action.PAUSE})
NAMED = frozenset({Sort.ADAPTER, Sort.VERSION})

GROUP = "group:"
"""Begins the name of a group among the tenants in `access.policies.roles`."""

_UNPROVEN = (Proof.NONE, Proof.CLAIMED)


class Roles:
    """The roles of principals: their credential's, and those that the configuration gives to tenants and groups."""

    def __init__(self, given: Mapping[str, Sequence[str]]) -> None:
        # Apart, so that a tenant that is called "group:x" does not get the roles of the group x.
        self._tenants = {name: frozenset(roles) for name, roles in given.items() if not name.startswith(GROUP)}
        self._groups = {
            name.removeprefix(GROUP): frozenset(roles) for name, roles in given.items() if name.startswith(GROUP)
        }

    def of(self, principal: Principal) -> frozenset[str]:
        """Return a principal's roles. A tenant that was not proven has none by its name."""
        roles = frozenset(principal.roles).intersection(ROLES)
        if principal.proof in _UNPROVEN:
            return roles
        if principal.tenant:
            roles |= self._tenants.get(principal.tenant, frozenset())
        for group in principal.groups:
            roles |= self._groups.get(group, frozenset())
        return roles


def prefix_owner(name: str, separator: str) -> str:
    """Return the only tenant that may own a name by its prefix, or "".

    That is the text before the first separator. So a tenant with a separator in its name owns nothing; else
    "acme/lab" would own a part of what "acme" owns.
    """
    owner, found, rest = name.partition(separator)
    return owner if found and rest else ""


def is_admitted(principal: Principal, resource: Resource) -> bool:
    """Return True if the adapter has no allow list or the list has the principal's tenant."""
    return resource.allow is None or principal.tenant in resource.allow


def may_be_changed(principal: Principal, resource: Resource, separator: str) -> bool:
    """Return True if the allow list lets a publisher change a name: it has its tenant, or the prefix is the tenant's.

    Else a publisher could give a name that is hidden from it an allow list of its own, and have its older versions.
    """
    owns = bool(principal.tenant) and principal.tenant == prefix_owner(resource.name, separator)
    return owns or is_admitted(principal, resource)


NOT_ADMITTED = Decision(False, "adapters.allow: the allow list does not have the tenant")


class ReadySet(ABC):
    """What the ready sets have in common; each answers who may use and who may change a name."""

    name: ClassVar[str]

    def __init__(self, roles: Roles, separator: str) -> None:
        self._roles = roles
        self._separator = separator

    def decide(self, principal: Principal, action: Action, resource: Resource) -> Decision:
        roles = self._roles.of(principal)
        if OPERATOR in roles:
            return self._yes("an operator may do everything")
        if resource.sort in NAMED:
            if action in USE:
                return (
                    self._use(principal, roles, action, resource) if is_admitted(principal, resource) else NOT_ADMITTED
                )
            if action in CHANGE:
                admits = may_be_changed(principal, resource, self._separator)
                return self._change(principal, roles, resource) if admits else NOT_ADMITTED
        elif resource.sort is Sort.BASE and action in USE:
            return self._yes("everybody may use the base model")
        elif resource.sort is Sort.TENANT and principal.tenant and resource.name == principal.tenant:
            return self._own(roles, action)
        return self._no("only an operator may do this")

    @abstractmethod
    def _use(self, principal: Principal, roles: frozenset[str], action: Action, resource: Resource) -> Decision:
        """Decide who uses a name that its allow list admits."""

    def _change(self, principal: Principal, roles: frozenset[str], resource: Resource) -> Decision:
        if PUBLISHER in roles:
            return self._yes("a publisher may change names")
        return self._no("only a publisher may change names")

    def _own(self, roles: frozenset[str], action: Action) -> Decision:
        """Decide what a principal may do with what is its own tenant's: requests and usage."""
        if action in (Action.LIST, Action.SHOW, Action.SEE_QUEUE):
            return self._yes("a tenant may see what is its own")
        if action is Action.CANCEL:
            if PUBLISHER in roles:
                return self._yes("a publisher may cancel its own tenant's requests")
            return self._no("only a publisher may cancel its own tenant's requests")
        return self._no("only an operator may do this")

    def _yes(self, rule: str) -> Decision:
        return Decision(True, f"{self.name}: {rule}")

    def _no(self, rule: str) -> Decision:
        return Decision(False, f"{self.name}: {rule}")


class Open(ReadySet):
    name = "open"

    def _use(self, principal: Principal, roles: frozenset[str], action: Action, resource: Resource) -> Decision:
        return self._yes("everybody may use what the allow list admits")


class TenantPrefix(ReadySet):
    name = "tenant_prefix"

    def _use(self, principal: Principal, roles: frozenset[str], action: Action, resource: Resource) -> Decision:
        if self._owns(principal, resource):
            return self._belongs(principal)
        if resource.allow is not None:
            return self._yes("the allow list shares the adapter with the tenant")
        return self._no("the name is not under the tenant's prefix, and no allow list shares it")

    def _change(self, principal: Principal, roles: frozenset[str], resource: Resource) -> Decision:
        if not self._owns(principal, resource):
            return self._no("the name is not under the tenant's prefix")
        return self._belongs(principal) if PUBLISHER in roles else super()._change(principal, roles, resource)

    def _owns(self, principal: Principal, resource: Resource) -> bool:
        return bool(principal.tenant) and principal.tenant == prefix_owner(resource.name, self._separator)

    def _belongs(self, principal: Principal) -> Decision:
        return self._yes(f"{principal.tenant}{self._separator} belongs to {principal.tenant}")


class ByRole(ReadySet):
    name = "roles"

    def _use(self, principal: Principal, roles: frozenset[str], action: Action, resource: Resource) -> Decision:
        if action is Action.INFER:
            return self._yes("everybody may infer with what the allow list admits")
        if not roles.isdisjoint((VIEWER, PUBLISHER)):
            return self._yes("a viewer may see and select what the allow list admits")
        return self._no("only a viewer may list, show and select versions")


READY: dict[str, type[ReadySet]] = {ready.name: ready for ready in (Open, TenantPrefix, ByRole)}
