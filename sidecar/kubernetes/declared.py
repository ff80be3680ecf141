"""Declared adapters, as a serving process has them: a cluster is followed, the registry brought to what it says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from sidecar.kubernetes.access import Access
from sidecar.kubernetes.api import Api, Collection, Object
from sidecar.kubernetes.choosing import Cluster, desired
from sidecar.kubernetes.declarations import Said, config_maps_in, loras_in, of_config_map, of_lora
from sidecar.kubernetes.mirror import Mirror
from sidecar.kubernetes.placement import View
from sidecar.kubernetes.prefetching import Prefetching
from sidecar.kubernetes.reconciler import Reconciler
from sidecar.kubernetes.reporting import Reporter
from sidecar.shell.gateway import Gateway
from sidecar.shell.managing import CLUSTER

logger = logging.getLogger(__name__)

RESTART_S = 5.0
FIRST_LOOK_S = 30.0

Read = Callable[[Object], Said]


class DeclaredAdapters:
    """Follows one namespace. `leads` says whether this process is the one that reconciles; `instance` is its name.

    `label` picks ConfigMaps, None if these declare nothing; `custom_resources` says whether LoraAdapters do.
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
        self._said: dict[str, dict[str, Said]] = {}
        """What each collection that was read declares: by plural, by owner."""
        self._tasks: list[asyncio.Task[None]] = []
        gateway.catalogue.reconciled = f"{CLUSTER}{namespace}/"

    @property
    def phases(self) -> Mapping[str, int]:
        """How many declarations are in each phase, as far as this process reconciles."""
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
        """Return when what is declared is registered, or had its turn: clients that know a name find it from the start.

        It is not waited for when names are there from before, nor where another process may be the one to do it.
        """
        if self._reconciler.has_names or not self._leads():
            return
        try:
            async with asyncio.timeout(FIRST_LOOK_S):
                await self._reconciler.settled.wait()
        except TimeoutError:
            logger.warning("not all that the cluster declares is registered after %.0f s; serving begins", FIRST_LOOK_S)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._api.close()

    async def _follow(self, collection: Collection, read: Read) -> None:
        """Read what a collection declares, again whenever it has changed."""
        known: dict[str, tuple[str, Said]] = {}
        async with aclosing(Mirror(self._api, collection).watch()) as snapshots:
            async for objects in snapshots:
                known = {name: _read_once(found, read, known.get(name)) for name, found in objects.items()}
                self._said[collection.plural] = {said.source.owner: said for _, said in known.values()}
                self._tell()

    def _tell(self) -> None:
        """Hand on what is declared, once all of it has been read: what is missing might declare a name, too."""
        if len(self._said) < len(self._sources):
            return
        said = {owner: each for found in self._said.values() for owner, each in found.items()}
        self._reconciler.take(Cluster(desired(said.values()), said))


def _read_once(found: Object, read: Read, before: tuple[str, Said] | None) -> tuple[str, Said]:
    """Return an object's resource version and what it declares, read only if that is another than before."""
    version = str(found["metadata"].get("resourceVersion", ""))
    return before if before is not None and before[0] == version else (version, read(found))


async def _kept_up(part: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a part for ever; a fault of ours that ends it is told, and it begins anew."""
    while True:
        try:
            await part()
        except Exception:
            logger.exception("what follows the cluster's declarations broke; it begins anew in %s s", RESTART_S)
        await asyncio.sleep(RESTART_S)
