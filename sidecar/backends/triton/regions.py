"""Remember the shared-memory regions that clients registered at a server, to register them again.

A restarted server has forgotten them, and its clients do not notice the restart: the sidecar is between.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import grpc.aio

from sidecar.tasks import ended

logger = logging.getLogger(__name__)

REGISTER_TIMEOUT_S = 2.0


class Regions:
    """The clients' regions at one server. `stub` is its KServe stub."""

    def __init__(self, backend: str, stub: Any) -> None:
        self._backend = backend
        self._stub = stub
        self._requests: dict[str, Any] = {}
        self._restoring: asyncio.Task[None] | None = None

    def note(self, verb: str, request: Any) -> None:
        """Note a verb that the server has carried out."""
        if verb == "SystemSharedMemoryRegister":
            self._requests[request.name] = request
        elif verb == "SystemSharedMemoryUnregister" and request.name:
            self._requests.pop(request.name, None)
        elif verb == "SystemSharedMemoryUnregister":
            self._requests.clear()

    def restore(self) -> None:
        """Begin to register all regions again."""
        self._restoring = asyncio.create_task(self._restore(self._restoring))

    async def restored(self) -> None:
        """Wait until a restoring that has begun is done."""
        if self._restoring is not None and not self._restoring.done():
            await asyncio.shield(self._restoring)

    async def close(self) -> None:
        await ended(self._restoring)

    async def _restore(self, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await earlier
        for name, request in list(self._requests.items()):
            try:
                await self._stub.SystemSharedMemoryRegister(request, timeout=REGISTER_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                    logger.warning("%s did not take the region %s again: %s", self._backend, name, error.details())
