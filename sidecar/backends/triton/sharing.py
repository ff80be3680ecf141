"""Register blobs of the store as shared-memory regions at a Triton server, which reads the weights in place.

A region outlives any load: the first load registers it, all refer to it, and it is unregistered before its file is
removed, because a server that still maps a truncated file dies of it. Names are unique to a process, so a restarted
server is told again, and what a dead process had registered is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.adapters.shared_memory import Mount

logger = logging.getLogger(__name__)

VERB_TIMEOUT_S = 5.0
IN_USE_WAIT_S = 0.005
"""First wait: right after a request's final response the server may still count its region as in use."""
IN_USE_WAIT_S_MAX = 0.25
PROBE_BYTES = 64


class RegionRefused(Exception):
    """The server refuses a region; the message is the server's own."""


class SharedBlobs:
    """This process's regions at one server. `stub` is its KServe stub."""

    def __init__(self, backend: str, stub: Any, mount: Mount) -> None:
        self._backend = backend
        self._stub = stub
        self._mount = mount
        self._registered: dict[str, asyncio.Future[None]] = {}

    def __len__(self) -> int:
        return len(self._registered)

    def has(self, path: str) -> bool:
        """Return True if a blob lies in the mount; a blob for which it had no room does not."""
        return Path(path).parent == self._mount.directory

    async def probe(self) -> None:
        """Return if the server reads our mount. Raises RegionRefused with the cause; grpc.RpcError without an answer.

        The server gets a file with a unique name, which another machine or another mount does not have.
        """
        descriptor, path = self._mount.create()
        try:
            os.posix_fallocate(descriptor, 0, PROBE_BYTES)
            await self._register(path.name, PROBE_BYTES)
            await self._unregister(path.name)
        except OSError as error:
            raise RegionRefused(f"{self._mount.directory}: {error.strerror}") from error
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)

    async def settle(self) -> None:
        """Compare our regions with the server's after it was reached, since it may have restarted.

        Unregisters regions of dead processes, and ours whose blobs have gone meanwhile.
        """
        reply = await self._stub.SystemSharedMemoryStatus(
            service_pb2.SystemSharedMemoryStatusRequest(), timeout=VERB_TIMEOUT_S
        )
        for name in set(self._registered) - set(reply.regions):
            del self._registered[name]
        for name in reply.regions:
            ours = name.startswith(self._mount.prefix)
            if (ours and name not in self._registered) or await asyncio.to_thread(self._mount.is_leftover, name):
                await self._unregister(name)

    async def refer(self, path: str, size_bytes: int) -> str:
        """Register a blob unless it is registered; return its region's name. Raises RegionRefused, grpc.RpcError."""
        name = Path(path).name
        known = self._registered.get(name)
        if known is None:
            known = self._registered[name] = asyncio.ensure_future(self._register(name, size_bytes))
            known.add_done_callback(lambda done: self._was_registered(name, done))
        await asyncio.shield(known)
        return name

    def _was_registered(self, name: str, done: asyncio.Future[None]) -> None:
        failed = done.cancelled() or done.exception() is not None
        if failed and self._registered.get(name) is done:
            del self._registered[name]

    def doubt(self) -> None:
        """Assume that the server has no region: it has reported one as unknown."""
        self._registered.clear()

    async def forget(self, name: str) -> None:
        """Return once the server no longer refers to a region. Raises grpc.RpcError if it does not answer."""
        known = self._registered.get(name)
        if known is None:
            return
        with contextlib.suppress(RegionRefused):
            await asyncio.shield(known)
        await self._unregister(name)
        self.lost(name)

    def lost(self, name: str) -> None:
        """Forget a region of a server that is gone."""
        self._registered.pop(name, None)

    async def close(self) -> None:
        """Unregister all regions. Raises grpc.RpcError if the server does not answer."""
        await asyncio.gather(*(self.forget(name) for name in list(self._registered)))

    async def _register(self, name: str, size_bytes: int) -> None:
        request = service_pb2.SystemSharedMemoryRegisterRequest(name=name, key=f"/{name}", byte_size=size_bytes)
        try:
            await self._stub.SystemSharedMemoryRegister(request, timeout=VERB_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.ALREADY_EXISTS:
                return  # names are unique, so it is this very file
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
            raise RegionRefused(error.details() or error.code().name) from error

    async def _unregister(self, name: str) -> None:
        wait_s = IN_USE_WAIT_S
        while True:
            try:
                request = service_pb2.SystemSharedMemoryUnregisterRequest(name=name)
                await self._stub.SystemSharedMemoryUnregister(request, timeout=VERB_TIMEOUT_S)
                return
            except grpc.aio.AioRpcError as error:
                if "in use" not in (error.details() or ""):
                    raise
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, IN_USE_WAIT_S_MAX)
