"""The limits in force: those of the configuration, and in their place those that were set at run time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sidecar.access.budgets.budgets import Budgets
from sidecar.access.budgets.charges import words_of
from sidecar.access.entries import LIMIT, AccessEntry, LimitEntry
from sidecar.access.store import AccessStore
from sidecar.config.access import Limit
from sidecar.errors import Reason, Refused

if TYPE_CHECKING:
    from sidecar.access.budgets.leases import Leases


class LimitBook:
    """Keeps the limits of `budgets`. A limit set at run time replaces all of the same tenant, class and adapter.

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
        if self._sharing is not None:
            self._sharing.cancel()
            await asyncio.wait([self._sharing])
        if self._leases is not None:
            await self._leases.close()

    def in_force(self) -> list[tuple[Limit, bool]]:
        """Return each limit, and whether it was set at run time."""
        at_run_time = self._store.limits()
        replaced = {words_of(limit) for limit in at_run_time}
        configured = [(limit, False) for limit in self._configured if words_of(limit) not in replaced]
        return [*configured, *((limit, True) for limit in at_run_time)]

    async def set(self, limit: Limit) -> None:
        """Set a limit at run time; return once every live replica has it."""
        await self._store.put(LimitEntry(limit))

    async def remove(self, tenant: str | None, klass: str | None, adapter: str | None) -> Limit:
        """Remove a limit that was set at run time and return it; one of the configuration counts again.

        Raises Refused(INVALID_REQUEST) if none was set at run time.
        """
        words = (tenant, klass, adapter)
        for limit, is_of_run_time in self.in_force():
            if words_of(limit) == words:
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
