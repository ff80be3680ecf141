"""Pools whose engines come and go: their finders, and the backends made of the engines found."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sidecar.backends.kind import Wiring
from sidecar.config.backends import Backend as Entry
from sidecar.config.discover import Discover
from sidecar.core.enums import Phase
from sidecar.discovery.dns import DnsFinder
from sidecar.discovery.following import Follower
from sidecar.discovery.found import Finder, Found
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


class PoolEngines:
    """The backends of one pool (`discovery.following.Engines`), each configured as `entry` says."""

    def __init__(self, entry: Entry, maker: BackendMaker) -> None:
        self._entry = entry
        self._maker = maker
        self._gateway = maker.gateway
        self._ids: dict[str, str] = {}

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
            self._gateway.fleet.set_leaving(backend, leaving)

    def is_done(self, name: str) -> bool:
        backend = self._gateway.state.backends[self._ids[name]]
        return backend.phase is Phase.DOWN or not backend.in_flight

    async def remove(self, name: str, cause: str) -> None:
        backend = self._ids.pop(name)
        logger.info("%s is removed: %s", backend, cause)
        await self._gateway.fleet.remove(backend, cause)
        self._maker.restarts.forget(backend)
        if self._maker.replica is not None:
            self._maker.replica.gone(backend)


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
        self._followers = [
            Follower(find(entry.discover), PoolEngines(entry, maker), entry.discover.grace_s, drain_s)
            for entry in configured
            if entry.discover is not None
        ]

    def start(self) -> None:
        for follower in self._followers:
            follower.start()

    async def stop(self) -> None:
        await asyncio.gather(*(follower.stop() for follower in self._followers))
