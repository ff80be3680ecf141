"""A file of Cedar policies that is read again when it changes. A faulty one changes nothing.

Policies written in Cedar: the schema that they are checked against, and how they are asked.

Cedar (https://www.cedarpolicy.com) has groups, a hierarchy of resources and a validator, and permits nothing that no
policy permits. It needs the extra `cedar`; only what is configured imports this file.

Names, tenants and labels travel as JSON beside the policies and never become Cedar text.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import cedarpy

from sidecar.access.cedar_text import Faulty, Statement, statements_of
from sidecar.access.deciding import CachedPolicy
from sidecar.access.policy import CHANGE, NAMED, NOT_ADMITTED, USE, Roles, is_admitted, may_be_changed, prefix_owner
from sidecar.access.principal import OPERATOR, Action, Decision, Principal, Resource, Sort
from sidecar.errors import Misused, Reason
from sidecar.files import read_regular

TYPES = {
    Sort.ADAPTER: "Adapter",
    Sort.VERSION: "Version",
    Sort.BASE: "Base",
    Sort.BACKEND: "Backend",
    Sort.TENANT: "Tenant",
    Sort.SYSTEM: "System",
}

_NAMES = (Sort.ADAPTER, Sort.VERSION)
_TENANTS = (Sort.TENANT, Sort.SYSTEM)

APPLIES: dict[Action, tuple[Sort, ...]] = {
    Action.INFER: (*_NAMES, Sort.BASE),
    Action.INFER_VERSION: _NAMES,
    Action.LIST: tuple(Sort),
    Action.SHOW: tuple(Sort),
    Action.REGISTER: _NAMES,
    Action.PROMOTE: _NAMES,
    Action.EVICT: _NAMES,
    Action.PAUSE: _NAMES,
    Action.DRAIN: (Sort.BACKEND,),
    Action.CANCEL: _TENANTS,
    Action.SEE_QUEUE: _TENANTS,
    Action.MANAGE: _TENANTS,
}
"""The kinds of resource for which an action can be asked. Anything else is denied."""

_ENTITIES = """\
entity Role;
entity Group;
entity Tenant in [Group, Role] { name: String };
entity Base { name: String };
entity Folder;
entity Adapter in [Folder, Base] {
  name: String, owner?: String, allow?: Set<Tenant>, prefix?: Tenant,
} tags String;
entity Version in [Adapter, Folder, Base] {
  name: String, owner?: String, allow?: Set<Tenant>, prefix?: Tenant, ordinal: Long, current: Bool,
} tags String;
entity Backend { name: String };
entity System;
action use, change;
"""


def _actions() -> Iterable[str]:
    for action, sorts in APPLIES.items():
        group = " in use" if action in USE else " in change" if action in CHANGE else ""
        types = ", ".join(TYPES[sort] for sort in sorts)
        yield f"action {action.value}{group} appliesTo {{ principal: Tenant, resource: [{types}] }};\n"


SCHEMA = _ENTITIES + "".join(_actions())
"""What policies may speak of. An adapter's labels are its tags, `prefix` is the tenant that owns the name's prefix."""

KEPT_MAX = 1024
"""How many sets of policies, and how many standings of principals, are kept ready to be asked."""


class CedarPolicy:
    """Decides by checked statements. An error while one is evaluated denies, whatever the others say.

    The allow list binds as in the ready sets, before any statement is asked.
    """

    def __init__(self, statements: Iterable[Statement], roles: Roles, separator: str) -> None:
        self._roles = roles
        self._separator = separator
        self._schema = cedarpy.Schema.from_str(SCHEMA)
        self._of: dict[tuple[str, str] | None, list[Statement]] = defaultdict(list)
        for statement in statements:
            self._of[_principal(statement.head)].append(statement)
        self._slice = lru_cache(KEPT_MAX)(self._made_slice)
        self._asked = lru_cache(KEPT_MAX)(self._asking)

    def decide(self, principal: Principal, action: Action, resource: Resource) -> Decision:
        roles = self._roles.of(principal)
        if resource.sort in NAMED and OPERATOR not in roles:
            if action in USE and not is_admitted(principal, resource):
                return NOT_ADMITTED
            if action in CHANGE and not may_be_changed(principal, resource, self._separator):
                return NOT_ADMITTED
        who, what = _uid("Tenant", principal.tenant), _uid(TYPES[resource.sort], resource.name)
        request = {"principal": who, "action": _uid("Action", action.value), "resource": what}
        try:
            policies, names, entities = self._asked(principal.tenant, principal.groups, roles, action)
            if what != who:
                entities = entities.with_added_json_str(json.dumps([self._entity(what, resource)]))
            answer = cedarpy.is_authorized(request, policies, entities, self._schema)
        except ValueError as error:  # a name that is no text, such as half a surrogate pair
            return Decision(False, f"cedar: {error}")
        if answer.diagnostics.errors:
            return Decision(False, f"cedar: {answer.diagnostics.errors[0]}")
        rules = [names[reason] for reason in sorted(answer.diagnostics.reasons)]
        return Decision(answer.allowed, f"cedar: {', '.join(rules) or 'no policy permits it'}")

    def _asking(
        self, tenant: str, groups: tuple[str, ...], roles: frozenset[str], action: Action
    ) -> tuple[cedarpy.PolicySet, dict[str, str], cedarpy.Entities]:
        """Return the policies that may apply, their names by Cedar's ids, and all entities but the resource."""
        who = _uid("Tenant", tenant)
        parents = [_uid("Group", group) for group in groups] + [_uid("Role", role) for role in sorted(roles)]
        group = [_uid("Action", word) for word, actions in (("use", USE), ("change", CHANGE)) if action in actions]
        entities = [_entity(who, {"name": tenant}, parents), _entity(_uid("Action", action.value), {}, group)]
        mine = frozenset((each["type"], each["id"]) for each in (who, *parents)).intersection(self._of)
        return *self._slice(mine), cedarpy.Entities.from_json_str(json.dumps(entities))

    def _made_slice(self, principals: frozenset[tuple[str, str]]) -> tuple[cedarpy.PolicySet, dict[str, str]]:
        """Return the policies whose head can match one of the principals, and their names.

        Cedar evaluates all policies of a set one by one; of a thousand, most name another tenant.
        """
        statements = [statement for key in (None, *principals) for statement in self._of.get(key, ())]
        names = {f"policy{number}": statement.name for number, statement in enumerate(statements)}
        return cedarpy.PolicySet.from_str("\n".join(statement.text for statement in statements)), names

    def _entity(self, uid: dict[str, str], resource: Resource) -> dict[str, Any]:
        if resource.sort is Sort.SYSTEM:
            return _entity(uid, {}, [])
        if resource.sort not in NAMED:
            return _entity(uid, {"name": resource.name}, [])
        attributes: dict[str, Any] = {"name": resource.name}
        if resource.owner:
            attributes["owner"] = resource.owner
        if resource.allow is not None:
            attributes["allow"] = [{"__entity": _uid("Tenant", tenant)} for tenant in resource.allow]
        if owner := prefix_owner(resource.name, self._separator):
            attributes["prefix"] = {"__entity": _uid("Tenant", owner)}
        words = resource.name.split(self._separator)
        folders = [self._separator.join(words[:count]) for count in range(1, len(words))]
        parents = [_uid("Folder", folder) for folder in folders]
        if resource.base_model:
            parents.append(_uid("Base", resource.base_model))
        if resource.sort is Sort.VERSION:
            parents.append(_uid("Adapter", resource.name))
            attributes |= {"ordinal": resource.ordinal or 0, "current": resource.is_current}
        return _entity(uid, attributes, parents) | {"tags": dict(resource.labels)}


def _uid(kind: str, name: str) -> dict[str, str]:
    return {"type": kind, "id": name}


def _entity(uid: dict[str, str], attributes: dict[str, Any], parents: list[dict[str, str]]) -> dict[str, Any]:
    return {"uid": uid, "attrs": attributes, "parents": parents}


def _principal(head: dict[str, Any]) -> tuple[str, str] | None:
    """Return the entity that a principal must be, or be in, for a policy to apply; None if any may match."""
    entity = head.get("in", head).get("entity") if head["op"] == "is" else head.get("entity")
    return None if entity is None else (entity["type"], entity["id"])


logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
FILE_BYTES_MAX = 4 << 20

Stamp = tuple[int, int, int, int] | None
"""What tells that a file was changed, None where there is none."""


class FilePolicy(CachedPolicy):
    """The policies of a file.

    A change counts once two looks in a row find the same: whoever writes the file in place is not interrupted. Raises
    Misused if the file is faulty at first.
    """

    def __init__(self, path: Path, roles: Roles, separator: str) -> None:
        self._path = path
        self._roles = roles
        self._separator = separator
        self._seen = self._tried = _stamp(path)
        try:
            self._text, policy = self._read()
        except Faulty as error:
            raise Misused(Reason.CONFIG_INVALID, f"access.policies.cedar: {path}: {error}") from error
        super().__init__(policy, str(path))

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.look()

    async def look(self) -> None:
        """Look at the file once, and take its policies if they have changed and can be read."""
        stamp = await asyncio.to_thread(_stamp, self._path)
        is_settled, self._seen = stamp == self._seen, stamp
        if not is_settled or stamp == self._tried:
            return
        self._tried = stamp
        try:
            text, policy = await asyncio.to_thread(self._read)
        except Faulty as error:
            self.fault = str(error)
            logger.error(
                "%s: %s; the policies that were read before still decide, correct the file", self._path, self.fault
            )
            return
        self.fault = ""
        if text != self._text:
            self._text = text
            self.replace(policy)
        logger.info("%s was read again; policies of epoch %d decide", self._path, self.epoch)

    def _read(self) -> tuple[str, CedarPolicy]:
        """Return the file's text and its policies. Raises Faulty."""
        try:
            text = read_regular(self._path, FILE_BYTES_MAX).decode("utf-8-sig")
        except OSError as error:
            raise Faulty(f"it cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise Faulty(f"it is no UTF-8 text: byte {error.start} is not") from error
        return text, CedarPolicy(statements_of(text, SCHEMA), self._roles, self._separator)


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode
