"""Declared adapters in a serving process: follow the cluster's declarations and reconcile the registry with them.

Load adapters declared with `prefetch` before their first request; each replica loads on its own backends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import aclosing
from functools import partial
from time import monotonic
from typing import Any

from sidecar.core import eligibility
from sidecar.core.state import Backend
from sidecar.errors import SidecarError
from sidecar.kubernetes.access import Access
from sidecar.kubernetes.api import Api, Collection, Object
from sidecar.kubernetes.choosing import Cluster, desired
from sidecar.kubernetes.declarations import DeclaringObject, config_maps_in, loras_in, of_config_map, of_lora
from sidecar.kubernetes.mirror import Mirror
from sidecar.kubernetes.placement import View, matches
from sidecar.kubernetes.reconciler import Reconciler
from sidecar.kubernetes.reporting import Reporter
from sidecar.shell.gateway import Gateway
from sidecar.shell.managing import CLUSTER
from sidecar.state.records import Record
from sidecar.tasks import ended

LOOK_S = 2.0
ASK_AGAIN_S = 60.0
"""The pause before the load of a version is requested again, if the load failed or the version was evicted."""


class Prefetching:
    """Prefetches for one process. A version is loaded once on each backend, and again after the backend restarts."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._asked: dict[tuple[str, str], float] = {}
        """The time (monotonic seconds) at which a version was requested on a backend; infinite once it was resident."""

    async def run(self) -> None:
        """Check all declared names periodically, for ever."""
        while True:
            known = self._gateway.state.versions
            self._asked = {key: at for key, at in self._asked.items() if key[0] in known}
            for record in self._gateway.catalogue.registry.all():
                if record.declared is not None and record.declared.prefetch is not None:
                    await self._prefetch(record, record.declared.prefetch)
            await asyncio.sleep(LOOK_S)

    async def _prefetch(self, record: Record, patterns: tuple[str, ...]) -> None:
        state = self._gateway.state
        name = state.names.get(record.name)
        if name is None:
            return
        backends = [backend for backend in eligibility.servers_of(state, name.digest) if backend.owned]
        missing = [backend for backend in backends if self._lacks(name.digest, backend, patterns)]
        if not missing:
            return
        for backend in missing:
            self._asked[name.digest, backend.id] = monotonic()
        to = tuple(backend.id for backend in missing)
        logger.info("%s is prefetched on %s", record.name, ", ".join(to))
        try:
            await self._gateway.prefetch(record.name, to)
        except SidecarError as error:
            logger.info("%s is not prefetched: %s", record.name, error.message)

    def _lacks(self, version: str, backend: Backend, patterns: tuple[str, ...]) -> bool:
        """Return True if a version must be requested on a backend now."""
        key = version, backend.id
        if not backend.takes_requests:
            self._asked.pop(key, None)
            return False
        if not matches(backend.id, patterns):
            return False
        if eligibility.resident(backend, version):
            self._asked[key] = float("inf")
        asked_s = self._asked.get(key)
        return asked_s is None or monotonic() - asked_s > ASK_AGAIN_S


logger = logging.getLogger(__name__)

RESTART_S = 5.0
FIRST_LOOK_S = 30.0

Read = Callable[[Object], DeclaringObject]


class DeclaredAdapters:
    """Follows one namespace. `leads` returns True while this process reconciles; `instance` is its name.

    `label` selects ConfigMaps (None: read none); `custom_resources` is True to read LoraAdapters.
    """

    def __init__(
        self,
        access: Access,
        gateway: Gateway,
        view: View,
        leads: Callable[[], bool],
        instance: str,
        namespace: str,
        label: str | None,
        custom_resources: bool,
    ) -> None:
        self._api = Api(access)
        self._reporter = Reporter(self._api, namespace, instance)
        self._reconciler = Reconciler(gateway.catalogue, lambda: gateway.state, view, namespace, leads, self._reporter)
        self._prefetching = Prefetching(gateway)
        self._leads = leads
        self._sources: list[tuple[Collection, Read]] = []
        if custom_resources:
            self._sources.append((loras_in(namespace), of_lora))
        if label is not None:
            self._sources.append((config_maps_in(namespace, label), of_config_map))
        self._objects: dict[str, dict[str, DeclaringObject]] = {}
        """The objects of each collection that was read: by plural, then by owner."""
        self._tasks: list[asyncio.Task[None]] = []
        gateway.catalogue.reconciled = f"{CLUSTER}{namespace}/"

    @property
    def phases(self) -> Mapping[str, int]:
        """The number of declarations in each phase; empty unless this process reconciles."""
        return self._reconciler.phases

    def start(self) -> None:
        parts: list[Callable[[], Coroutine[Any, Any, None]]] = [
            self._reconciler.run,
            self._reporter.run,
            self._prefetching.run,
            *(partial(self._follow, collection, read) for collection, read in self._sources),
        ]
        self._tasks = [asyncio.create_task(_kept_up(part)) for part in parts]

    async def first_look(self) -> None:
        """Wait until every declaration was registered or tried once, so that clients find declared names at once.

        Returns at once if names are registered from before, or if another process may be the one that reconciles.
        """
        if self._reconciler.has_names or not self._leads():
            return
        try:
            async with asyncio.timeout(FIRST_LOOK_S):
                await self._reconciler.settled.wait()
        except TimeoutError:
            logger.warning("not all declared adapters are registered after %.0f s; serving begins", FIRST_LOOK_S)

    async def stop(self) -> None:
        await ended(*self._tasks)
        await self._api.close()

    async def _follow(self, collection: Collection, read: Read) -> None:
        """Read a collection's declarations, at first and after each change."""
        known: dict[str, tuple[str, DeclaringObject]] = {}
        async with aclosing(Mirror(self._api, collection).watch()) as snapshots:
            async for objects in snapshots:
                known = {name: _read_once(found, read, known.get(name)) for name, found in objects.items()}
                self._objects[collection.plural] = {each.source.owner: each for _, each in known.values()}
                self._pass_on()

    def _pass_on(self) -> None:
        """Pass the declarations on once every collection was read: an unread one might declare a name too."""
        if len(self._objects) < len(self._sources):
            return
        objects = {owner: each for found in self._objects.values() for owner, each in found.items()}
        self._reconciler.take(Cluster(desired(objects.values()), objects))


def _read_once(found: Object, read: Read, before: tuple[str, DeclaringObject] | None) -> tuple[str, DeclaringObject]:
    """Return an object's resource version and its declarations, parsed only if the version has changed."""
    version = str(found["metadata"].get("resourceVersion", ""))
    return before if before is not None and before[0] == version else (version, read(found))


async def _kept_up(part: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine for ever: log a bug that ends it, and start it again."""
    while True:
        try:
            await part()
        except Exception:
            logger.exception("following the cluster's declarations failed; it restarts in %s s", RESTART_S)
        await asyncio.sleep(RESTART_S)
