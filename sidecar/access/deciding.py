"""Policies as the rest of the process asks them: with a cache, sets of visible names, and a reload while it runs."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter

from sidecar.access.principal import Action, Decision, Policy, Principal, Proof, Resource
from sidecar.adapters.names import BASE_NAME_LENGTH_MAX

DECISIONS_MAX = 1 << 15
"""The most decisions that are kept; beyond it, those that were not asked for longest go."""

VISIBLE_NAMES_MAX = 1 << 20
"""The most names that the kept sets of visible names have together; an empty one counts as `VISIBLE_OVERHEAD`."""
VISIBLE_OVERHEAD = 32

SLICE_S = 0.002
"""How long deciding what is visible may hold the event loop at a time.

A thread would hold it longer: Cedar keeps the interpreter's lock while it decides, and a thread that computes gives
the lock away only every 5 ms.
"""

Standing = tuple[str, tuple[str, ...], tuple[str, ...], Proof]
"""All of a principal that a decision depends on."""


def standing_of(principal: Principal) -> Standing:
    return principal.tenant, principal.groups, principal.roles, principal.proof


@dataclass(frozen=True, slots=True)
class _Visible:
    """What a standing saw of the names at the registry's change number `change`."""

    change: int
    names: frozenset[str]

    @property
    def weight(self) -> int:
        return len(self.names) + VISIBLE_OVERHEAD


class Listing:
    """The resources as they were last seen, and since which change of the registry each is as it is."""

    def __init__(self) -> None:
        self.change = -1
        self._since: dict[str, tuple[Resource, int]] = {}

    def take(self, resources: Sequence[Resource], change: int) -> None:
        since = {}
        for resource in resources:
            held = self._since.get(resource.name)
            same = held is not None and (held[0] is resource or held[0] == resource)
            since[resource.name] = held if held is not None and same else (resource, change)
        self.change, self._since = change, since

    def is_unchanged(self, name: str, change: int) -> bool:
        """Return True if the name's resource is as it was at that change."""
        held = self._since.get(name)
        return held is not None and held[1] <= change


class CachedPolicy:
    """A policy with a cache. `epoch` rises when the policy is replaced, which empties the cache.

    `source` names the ready set or the file, `fault` says why the file, as it is now, does not decide; "" if it does.
    """

    def __init__(self, policy: Policy, source: str = "") -> None:
        self.source = source
        self.on_replaced: Callable[[], None] = lambda: None
        self.fault = ""
        self.epoch = 0
        self._forgotten = 0
        self._forget()
        self._running: dict[tuple[Standing, int, int], asyncio.Task[frozenset[str]]] = {}
        self.replace(policy)

    def replace(self, policy: Policy) -> None:
        """Decide by another policy from now on."""
        self.epoch += 1
        self.on_replaced()
        self._policy = policy
        self._forget()

        @lru_cache(DECISIONS_MAX)
        def decide(
            tenant: str,
            groups: tuple[str, ...],
            roles: tuple[str, ...],
            proof: Proof,
            action: Action,
            resource: Resource,
        ) -> Decision:
            return policy.decide(Principal(tenant, proof, "", groups, roles), action, resource)

        self._decide = decide

    def _forget(self) -> None:
        """Forget what is visible to whom."""
        self._forgotten += 1
        self._listing = Listing()
        self._visible: OrderedDict[Standing, _Visible] = OrderedDict()
        self._weight = 0

    async def watch(self) -> None:
        """Replace the policy whenever its source changes, until cancelled. A ready set does not change: return."""

    def decide(self, principal: Principal, action: Action, resource: Resource) -> Decision:
        """Return the policy's decision, by the tenant, groups, roles and proof of the principal."""
        if len(resource.name) > BASE_NAME_LENGTH_MAX:  # nothing is called so, and megabytes do not belong in a cache
            return self._policy.decide(principal, action, resource)
        return self._decide(principal.tenant, principal.groups, principal.roles, principal.proof, action, resource)

    async def visible(self, principal: Principal, resources: Sequence[Resource], change: int) -> frozenset[str]:
        """Return the names among the resources that a principal may list.

        `change` is the registry's change number, which rises with each change of the resources. Only those that
        differ from what the principal was told of before are decided again.
        """
        if change < self._listing.change:  # another registry, or one that was restored: the number tells nothing
            self._forget()
        if change != self._listing.change:
            self._listing.take(resources, change)
        standing = standing_of(principal)
        known = self._visible.get(standing)
        if known is not None and known.change == change:
            self._visible.move_to_end(standing)
            return known.names
        key = (standing, self._forgotten, change)
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(self._see(principal, resources, change))
            task.add_done_callback(lambda _: self._running.pop(key))
        return await asyncio.shield(task)  # others may wait for it too

    async def _see(self, principal: Principal, resources: Sequence[Resource], change: int) -> frozenset[str]:
        standing, forgotten, policy = standing_of(principal), self._forgotten, self._policy
        listing, known = self._listing, self._visible.get(standing)
        names = []
        began = perf_counter()
        for resource in resources:
            if known is not None and listing.is_unchanged(resource.name, known.change):
                allowed = resource.name in known.names
            else:
                allowed = policy.decide(principal, Action.LIST, resource).allowed
            if allowed:
                names.append(resource.name)
            if perf_counter() - began > SLICE_S:
                await asyncio.sleep(0)
                began = perf_counter()
        seen = frozenset(names)
        if forgotten == self._forgotten:
            self._keep(standing, _Visible(change, seen))
        return seen

    def _keep(self, standing: Standing, visible: _Visible) -> None:
        former = self._visible.pop(standing, None)
        self._weight += visible.weight - (former.weight if former else 0)
        self._visible[standing] = visible
        while self._weight > VISIBLE_NAMES_MAX and len(self._visible) > 1:
            _, dropped = self._visible.popitem(last=False)
            self._weight -= dropped.weight
