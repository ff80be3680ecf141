"""The parts of access in one process: made from the configuration, started and stopped together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from time import time
from typing import TYPE_CHECKING

from sidecar.access.access import OURSELVES, Access
from sidecar.access.audit import Audit
from sidecar.access.budgets.book import LimitBook
from sidecar.access.budgets.budgets import Budgets
from sidecar.access.budgets.kept import Kept
from sidecar.access.budgets.meters import Alone, Sharing
from sidecar.access.configured import classes_of, limited_classes_of, limits_of_nothing, policy_of
from sidecar.access.external import ExternalCheck
from sidecar.access.keys import KeyBook
from sidecar.access.policy import Roles
from sidecar.access.principal import SYSTEM, Action
from sidecar.access.salts import Salts
from sidecar.access.store import BUDGETS, FOLDER, REPLICAS, AccessStore
from sidecar.access.tokens import Tokens
from sidecar.config import Config
from sidecar.config.listeners import is_local
from sidecar.fronts.admin.audit import AuditCalls
from sidecar.fronts.admin.keys import KeyCalls
from sidecar.fronts.admin.limits import LimitCalls
from sidecar.state.registry import Registry
from sidecar.tasks import Tasks, ended

if TYPE_CHECKING:
    from sidecar.access.budgets.leases import Leases

logger = logging.getLogger(__name__)


class AccessParts:
    """What decides who may use this process. `data` is the data directory, None without one.

    `member` and `member_ttl_s` are those of the registry; `me` names this process among those that share its budgets.
    """

    def __init__(
        self,
        config: Config,
        data: Path | None,
        registry: Registry,
        member: str = "",
        member_ttl_s: float = 10.0,
        me: str = "",
    ) -> None:
        identity, access = config.identity, config.access
        folder = None if data is None else data / FOLDER
        self.config = config
        self._watching: asyncio.Task[None] | None = None
        self._recording = Tasks()
        self.audit = Audit.configured(access.audit, data)
        self.policy = policy_of(access.policies)
        place = None if config.state.url is None else config.state.location
        self.store = AccessStore(data, place, member, member_ttl_s)
        keys_file = None if identity.keys_file is None else Path(identity.keys_file).expanduser()
        self.keys = KeyBook(self.store, keys_file, identity.stale_max_s)
        self.tokens = Tokens(identity.issuers, folder) if identity.issuers else None
        is_in_mesh = identity.certificates.forwarded is not None
        self.external = None if identity.external is None else ExternalCheck(identity.external, is_in_mesh)
        self.count_replicas: Callable[[], int] = lambda: 1
        leases: Leases | None = None
        if place is not None:
            from sidecar.access.budgets.leases import Leases  # the client is imported only if there is a Redis
            from sidecar.state.redis.link import Link

            kept = None if folder is None else folder / REPLICAS
            leases = Leases(Link(place), me, lambda: self.count_replicas(), time, kept)
        sharing: Sharing = leases or Alone()
        self.kept = None if folder is None else Kept(sharing, folder / BUDGETS, time)
        self.budgets = Budgets(access.limits, time, self.kept or sharing)
        self.limits = LimitBook(self.store, access.limits, self.budgets, leases)
        self.salts = Salts(self.store) if identity.mode == "enforce" else None
        self.access = Access(
            identity,
            config.tenant_from,
            registry.get,
            self.policy,
            self.audit,
            by_version=access.policies.cedar is not None or access.policies.ready == "roles",
            keys=self.keys if identity.keys else None,
            tokens=self.tokens,
            budgets=self.budgets,
            external=self.external,
            salts=self.salts,
            change_of=lambda: registry.last_change,
        )
        self._key_calls = KeyCalls(self.store, self.keys, classes_of(config), self.access)
        self._limit_calls = LimitCalls(self.limits, self.access, registry.get, limited_classes_of(config))
        self.calls: tuple[object, ...] = (
            self._key_calls,
            AuditCalls(self.audit, Roles(access.policies.roles)),
            self._limit_calls,
        )
        """The parts of the admin service Access."""

    def configure(self, config: Config) -> None:
        """Take what changes of a configuration while the process runs: limits and classes."""
        self.config = config
        self._key_calls.classes = classes_of(config)
        self._limit_calls.classes = limited_classes_of(config)
        self.limits.configure(config.access.limits)
        for text in limits_of_nothing(config):
            logger.warning("%s; the limit has no effect", text)

    async def start(self) -> None:
        self._warn()
        self.audit.start()
        await self.store.start()
        self.keys.start()
        if self.salts is not None:
            await self.salts.start()
        if self.kept is not None:
            await self.kept.start()
        await self.limits.start()
        if self.tokens is not None:
            self.tokens.start()
        if self.external is not None:
            self.external.start()
        self.policy.on_replaced = self._record_policy
        self._watching = asyncio.create_task(self.policy.watch())

    def _record_policy(self) -> None:
        before, after = {"epoch": self.policy.epoch - 1}, {"epoch": self.policy.epoch}
        self._recording.spawn(
            self.access.changed(OURSELVES, "policy file", Action.MANAGE, SYSTEM, before, after, self.policy.source)
        )

    def away_s(self) -> float:
        """Return for how many seconds Redis has not answered; 0 while it answers, or without it."""
        since = self.store.away_since
        return 0.0 if since is None else max(0.0, time() - since)

    async def stop(self) -> None:
        await ended(self._watching)
        if self.tokens is not None:
            await self.tokens.stop()
        if self.external is not None:
            await self.external.stop()
        await self.limits.close()
        if self.kept is not None:
            await self.kept.close()
        await self.keys.close()
        await self.store.close()
        await asyncio.to_thread(self.audit.stop)

    def _warn(self) -> None:
        """Say loudly who is believed where other machines come in, and which limits nothing matches."""
        for text in limits_of_nothing(self.config):
            logger.warning("%s; the limit has no effect", text)
        listeners = self.config.listeners
        public = [
            f"listeners.{name} ({listener.address})"
            for name, listener in (("data", listeners.data), ("http", listeners.http))
            if not (is_local(listener.address) or listener.address.startswith("unix:"))
        ]
        if public and self.config.identity.mode == "off":
            logger.warning(
                "identity.mode is off: who reaches %s is believed to be the tenant that it names, may use every "
                "adapter that admits that tenant, and is not asked for a credential; set identity.mode: observe to see "
                "who would be denied, then enforce",
                " and ".join(public),
            )
        elif public and self.config.identity.mode == "observe":
            logger.warning("identity.mode is observe: nobody is denied at %s", " and ".join(public))
