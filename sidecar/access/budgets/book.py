"""The limits in force: those of the configuration, and in their place those that were set at run time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sidecar.access.budgets.budgets import NUMBERED, Budgets
from sidecar.access.budgets.charges import which
from sidecar.access.entries import LIMIT, AccessEntry, LimitEntry
from sidecar.access.store import AccessStore
from sidecar.config.access import Limit
from sidecar.errors import Reason, Refused
from sidecar.tasks import ended

if TYPE_CHECKING:
    from sidecar.access.budgets.leases import Leases


class LimitBook:
    """Keeps the limits of `budgets`. One set at run time takes the place of the configuration's for the same tenant,
    class, adapter and kind of tokens.

    `leases` share the budgets with other replicas; None without Redis.
    """

    def __init__(
        self, store: AccessStore, configured: Sequence[Limit], budgets: Budgets, leases: Leases | None = None
    ) -> None:
        self._store = store
        self._configured = tuple(configured)
        self._budgets = budgets
        self._leases = leases
        self._sharing: asyncio.Task[None] | None = None
        self._has_changes = False

    async def start(self) -> None:
        """Take the limits of the store, which has started, and follow its changes; begin to share the budgets."""
        self._store.subscribe(self._changed)
        self._apply()
        if self._leases is not None:
            await self._leases.learn()
            self._sharing = asyncio.create_task(self._leases.run())

    async def close(self) -> None:
        await ended(self._sharing)
        if self._leases is not None:
            await self._leases.close()

    def configure(self, configured: Sequence[Limit]) -> None:
        """Replace the limits of the configuration. What is taken stays taken."""
        self._configured = tuple(configured)
        self._apply()

    def in_force(self) -> list[tuple[Limit, bool]]:
        """Return each limit, and whether it was set at run time."""
        at_run_time = self._store.limits()
        replaced = {which(limit) for limit in at_run_time}
        configured = [(limit, False) for limit in self._configured if which(limit) not in replaced]
        return [*configured, *((limit, True) for limit in at_run_time)]

    async def set(self, tenant: str, klass: str, adapter: str, tokens: str, numbers: Mapping[str, int]) -> Limit:
        """Set numbers of a limit at run time; return the whole limit once every live replica has it.

        A number of 0 takes it away; one that is not given stays as it is in force. Raises ValidationError, or
        Refused(INVALID_REQUEST) if no number is left.
        """
        words = {"tenant": tenant, "class_name": klass, "adapter": adapter, "tokens": tokens}
        named = {word: value for word, value in words.items() if value}
        own = (tenant or None, klass or None, adapter or None), tokens or "both"
        former = next((limit for limit, _ in self.in_force() if which(limit) == own), None)
        present = {} if former is None else former.model_dump(include=set(NUMBERED), exclude_none=True)
        if nothing := sorted(name for name, value in numbers.items() if not value and name not in present):
            raise Refused(
                Reason.INVALID_REQUEST,
                f"the limit has no {' and no '.join(nothing)} of its own to take away. What one for each (*) gives it "
                "is in sidecar limits list; set a larger number here to raise it",
            )
        left = {name: value for name, value in (present | dict(numbers)).items() if value}
        if present and not left:
            raise Refused(
                Reason.INVALID_REQUEST, "no number of the limit would be left; sidecar limits remove takes it away"
            )
        limit = Limit.model_validate(named | left)
        await self._store.put(LimitEntry(limit))
        return limit

    async def remove(self, tenant: str, klass: str, adapter: str, tokens: str) -> Limit:
        """Remove a limit that was set at run time and return it; one of the configuration counts again.

        Raises Refused(INVALID_REQUEST) if none was set at run time.
        """
        own = (tenant or None, klass or None, adapter or None), tokens or "both"
        for limit, is_of_run_time in self.in_force():
            if which(limit) == own:
                if not is_of_run_time:
                    raise Refused(
                        Reason.INVALID_REQUEST,
                        "this limit is in the configuration (access.limits): remove it there, or set another",
                    )
                await self._store.remove(LimitEntry(limit).name)
                return limit
        raise Refused(
            Reason.INVALID_REQUEST, "no limit was set for these; sidecar limits list shows those that there are"
        )

    async def taken(self, limits: Sequence[Limit], tenant: str) -> list[dict[str, int]]:
        """Return what is taken now of each number of each limit, as `Budgets.taken`, by all replicas."""
        for limit in limits:
            self._budgets.look(limit, tenant)
        if self._leases is not None:
            await self._leases.ask()
        return [self._budgets.taken(limit, tenant) for limit in limits]

    def _changed(self, name: str, entry: AccessEntry | None) -> None:
        if name.startswith(LIMIT) and not self._has_changes:  # of many changes at once all are taken together
            self._has_changes = True
            asyncio.get_running_loop().call_soon(self._apply)

    def _apply(self) -> None:
        self._has_changes = False
        self._budgets.set_limits([limit for limit, _ in self.in_force()])
