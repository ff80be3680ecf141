"""Verbs that a backend misses because it is down, told to it in their order once it is up."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import grpc

from sidecar.core.enums import Phase
from sidecar.shell.gateway import Gateway

logger = logging.getLogger(__name__)

LOOK_S = 0.05
MISSED_MAX = 1024
"""Verbs that are kept for one backend; the oldest go first."""


class Later:
    """What each backend has missed."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._missed: dict[str, deque[tuple[str, Any]]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def tell(self, backends: Sequence[str], verb: str, request: Any) -> None:
        """Tell some backends a verb when they are up."""
        for backend in backends:
            self._missed.setdefault(backend, deque(maxlen=MISSED_MAX)).append((verb, request))
            if backend not in self._tasks:
                self._tasks[backend] = asyncio.create_task(self._catch_up(backend))

    async def _catch_up(self, backend: str) -> None:
        missed, endpoint = self._missed[backend], self._gateway.backends.get(backend)
        while missed and endpoint is not None and self._gateway.backends.get(backend) is endpoint:
            if self._gateway.state.backends[backend].phase is not Phase.UP:
                await asyncio.sleep(LOOK_S)
                continue
            verb, request = missed.popleft()
            try:
                await endpoint.call(verb, request)
            except grpc.RpcError as error:
                logger.warning("%s was down and did not take %s later: %s", backend, verb, error)
        del self._missed[backend], self._tasks[backend]
