"""Load adapters declared with `prefetch` before their first request; each replica loads on its own backends."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

from sidecar.core import eligibility
from sidecar.core.state import Backend
from sidecar.errors import SidecarError
from sidecar.kubernetes.placement import matches
from sidecar.shell.gateway import Gateway
from sidecar.state.records import Record

logger = logging.getLogger(__name__)

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
