"""Copy adapters' files between replicas: one fetch serves all replicas, and a push reaches all of them."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import grpc
import grpc.aio

from sidecar.adapters.folder import Folder
from sidecar.adapters.origins.files import files_among, is_file_name
from sidecar.adapters.origins.limits import Limits
from sidecar.adapters.origins.origin import PUSHED, is_url
from sidecar.errors import Invalid, Reason, Refused
from sidecar.proto import peers_pb2
from sidecar.replicas.peers import Peers
from sidecar.shell.gateway import Gateway

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
KEEP_S = 300.0
"""How long another replica may take to fetch files that it is asked to keep."""


class PeerFiles:
    """The files that the other replicas have (`shell.sources.Others`)."""

    def __init__(self, peers: Peers, limits: Limits) -> None:
        self._peers = peers
        self._limits = limits

    async def bring(self, digest: str, folder: Path) -> bool:
        for member, stub in self._peers.stubs().items():
            try:
                await self._receive(stub.Source(peers_pb2.SourceRequest(digest=digest)), folder)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    logger.info("replica %s did not send %s: %s", member, digest[:12], error.details())
            except ValueError as error:
                logger.warning("replica %s sent no adapter for %s: %s", member, digest[:12], error)
            else:
                logger.info("%s came from replica %s", digest[:12], member)
                return True
            await asyncio.to_thread(_empty, folder)
        return False

    async def _receive(self, chunks: AsyncIterator[Any], folder: Path) -> None:
        """Write files from chunks. Raises ValueError for a file that no adapter has, and for too many bytes."""
        file: IO[bytes] | None = None
        name, size_bytes = "", 0
        try:
            async for chunk in chunks:
                if chunk.name != name:
                    if not is_file_name(chunk.name):
                        raise ValueError(f"{chunk.name[:80]!r} is no file of an adapter")
                    if file is not None:
                        file.close()
                    name = chunk.name
                    file = await asyncio.to_thread((folder / name).open, "xb")
                assert file is not None
                size_bytes += len(chunk.data)
                if size_bytes > self._limits.size_bytes_max:
                    raise ValueError(f"it is longer than {self._limits.size_bytes_max} bytes")
                await asyncio.to_thread(file.write, chunk.data)
        finally:
            if file is not None:
                file.close()

    async def spread(self, digest: str) -> None:
        stubs = self._peers.stubs()
        for member, stub in stubs.items():
            try:
                await stub.Keep(peers_pb2.KeepRequest(digest=digest), timeout=KEEP_S)
            except grpc.aio.AioRpcError as error:
                logger.warning("replica %s did not take %s: %s", member, digest[:12], error.details())
            else:
                return
        if stubs:
            raise Refused(
                Reason.STATE_UNAVAILABLE,
                "it is registered, but its files are on one replica only: no other replica took them; push it again",
            )


class FilesHere:
    """Serves this replica's files to the other replicas."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def send(self, digest: str, context: Any) -> None:
        """Send a version's files over a call. Aborts with NOT_FOUND if this replica does not have them."""
        versions = self._gateway.state.versions.values()
        origins = [held.origin for held in versions if held.adapter.digest == digest and not is_url(held.origin)]
        folder = await asyncio.to_thread(self._folder, digest, origins)
        if folder is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"the files of {digest[:12]} are not here")
            return
        for name in files_among(await asyncio.to_thread(folder.names, digest[:12])):
            descriptor = await asyncio.to_thread(folder.open, name, digest[:12])
            if descriptor is None:
                continue  # the other replica finds that it is missing
            with os.fdopen(descriptor, "rb") as file:
                while True:
                    data = await asyncio.to_thread(file.read, CHUNK_BYTES)
                    if not data:
                        break
                    await context.write(peers_pb2.SourceChunk(name=name, data=data))

    async def keep(self, digest: str) -> None:
        """Fetch a version's files to this replica. Raises SidecarError."""
        await self._gateway.sources.locate(f"{PUSHED}://{digest}", digest)

    def _folder(self, digest: str, origins: list[str]) -> Folder | None:
        sources = self._gateway.sources
        if sources.spool.holds(digest):
            return Folder(sources.spool.folder(digest), digest[:12])
        for origin in origins:
            with suppress(Invalid):
                return sources.allow.open_again(digest[:12], Path(origin))
        return None


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
