"""Pools whose engines come and go: their finders, and the backends made of the engines found."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sidecar.backends.kind import Wiring
from sidecar.config.backends import Backend as Entry
from sidecar.config.discover import Discover
from sidecar.core.enums import Phase
from sidecar.discovery.dns import DnsFinder
from sidecar.discovery.following import Follower
from sidecar.discovery.found import Finder, Found
from sidecar.errors import Misused, Reason
from sidecar.kubernetes.endpoint_slices import EndpointSlices
from sidecar.replicas.replica import Replica
from sidecar.serve.pool import make_backend
from sidecar.serve.restarting import Restarts
from sidecar.shell.gateway import Gateway

logger = logging.getLogger(__name__)


def finder_of(discover: Discover) -> Finder:
    """Return the finder of a pool's engines. Raises Misused if it cannot work here."""
    if discover.dns is not None:
        host, _, port = discover.dns.rpartition(":")
        return DnsFinder(host.strip("[]"), int(port), discover.every_s, discover.empty_s)
    slices = discover.endpoint_slices
    assert slices is not None
    return EndpointSlices.in_cluster(slices.service, slices.port, slices.namespace)


async def found_now(entry: Entry, patience_s: float = 5.0) -> list[Entry]:
    """Return an entry for each engine of a pool that is ready now; [] if none is found in time."""
    assert entry.discover is not None
    try:
        async with asyncio.timeout(patience_s):
            async for found in finder_of(entry.discover).watch():
                ready = sorted(
                    (each for each in found if each.ready and not each.terminating), key=lambda one: one.name
                )
                return [entry.at(each.name, each.address) for each in ready]
    except TimeoutError:
        logger.info("no engine of %s was found in %s s", entry.identity, patience_s)
    return []


@dataclass(frozen=True)
class BackendMaker:
    """What is needed to make a backend and to have it served."""

    gateway: Gateway
    replica: Replica | None
    wiring: Wiring
    restarts: Restarts


def has_ended(gateway: Gateway, backend: str) -> bool:
    """Return True if nothing runs at a backend, and nothing waits there, that is about to go."""
    known = gateway.state.backends[backend]
    return known.phase is Phase.DOWN or not (known.in_flight or known.queued)


class PoolEngines:
    """The backends of one pool (`discovery.following.Engines`), each configured as `entry` says."""

    def __init__(self, entry: Entry, maker: BackendMaker) -> None:
        self._entry = entry
        self._maker = maker
        self._gateway = maker.gateway
        self._ids: dict[str, str] = {}
        self.retired = False
        """The pool was taken out of the configuration."""

    @property
    def are_gone(self) -> bool:
        return not self._ids

    async def add(self, found: Found, fresh: bool) -> None:
        pool = self._entry.identity
        entry = self._entry.at(found.name, found.address)
        declared = self._gateway.state.config.pools[pool]
        backend, facts = make_backend(entry, declared, self._maker.wiring)
        logger.info("%s is found at %s", backend.id, found.address)
        slices = None if self._entry.discover is None else self._entry.discover.endpoint_slices
        self._maker.restarts.declare(entry, found.name, None if slices is None else slices.namespace)
        await self._gateway.add_backend(backend, facts, pool, fresh)
        self._ids[found.name] = backend.id
        if self._maker.replica is not None:
            self._maker.replica.found(backend.id)

    def leave(self, name: str, leaving: bool) -> None:
        backend = self._ids[name]
        if self._gateway.state.backends[backend].leaving != leaving:
            logger.info("%s %s", backend, "takes nothing new: it is about to go" if leaving else "stays after all")
            self._gateway.fleet.set_leaving(backend, leaving, serves_queue=self.retired)

    def is_done(self, name: str) -> bool:
        return has_ended(self._gateway, self._ids[name])

    async def remove(self, name: str, cause: str) -> None:
        backend = self._ids.pop(name)
        logger.info("%s is removed: %s", backend, cause)
        await self._gateway.remove_backend(backend, cause)
        self._maker.restarts.forget(backend)
        if self._maker.replica is not None:
            self._maker.replica.gone(backend)


@dataclass
class _Pool:
    entry: Entry
    engines: PoolEngines
    follower: Follower


class DiscoveredPools:
    """Follows all pools of a configuration. Runs at an engine that is gone may go on for `drain_s` seconds."""

    def __init__(
        self,
        configured: Sequence[Entry],
        maker: BackendMaker,
        find: Callable[[Discover], Finder] = finder_of,
        drain_s: float = 300.0,
    ) -> None:
        """Raises Misused if the engines of a pool cannot be found this way."""
        self._maker = maker
        self._find = find
        self._drain_s = drain_s
        self._pools: dict[str, _Pool] = {}
        self._pools = self.made_of(configured)

    def made_of(self, configured: Sequence[Entry]) -> dict[str, _Pool]:
        """Make the pools of a configuration; those that were made before are as they are. Raises Misused."""
        made: dict[str, _Pool] = {}
        for entry in configured:
            if entry.discover is not None:
                made[entry.identity] = self._known(entry) or self._made(entry, entry.discover)
        return made

    def _known(self, entry: Entry) -> _Pool | None:
        known = self._pools.get(entry.identity)
        if known is None or (known.engines.retired and known.engines.are_gone):
            return None
        if known.entry != entry:
            raise Misused(
                Reason.CONFIG_INVALID,
                f"{entry.identity}: the pool of this name is still being taken out, and has other settings; wait until "
                "it is, or restart",
            )
        return known

    def _made(self, entry: Entry, discover: Discover) -> _Pool:
        engines = PoolEngines(entry, self._maker)
        return _Pool(entry, engines, Follower(self._find(discover), engines, discover.grace_s, self._drain_s))

    def start(self) -> None:
        for pool in self._pools.values():
            pool.follower.start()

    async def change(self, made: Mapping[str, _Pool]) -> None:
        """Follow these pools from now on. Engines of the others take nothing new and go once nothing runs there."""
        before, self._pools = self._pools, {**self._pools, **made}
        for name, pool in self._pools.items():
            was_retired, pool.engines.retired = pool.engines.retired, name not in made
            if pool.engines.retired and not was_retired:
                await pool.follower.retire()
            elif before.get(name) is not pool or (was_retired and not pool.engines.retired):
                pool.follower.start()

    async def stop(self) -> None:
        await asyncio.gather(*(pool.follower.stop() for pool in self._pools.values()))
