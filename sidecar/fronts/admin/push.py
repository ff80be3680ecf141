"""`Adapters.Push`: receive an adapter's files from a client, in chunks, into the spool."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from sidecar.adapters.names import check_name
from sidecar.adapters.pushed import PushedFile, Receiver, check_announced, wrong
from sidecar.errors import Reason, Refused
from sidecar.fronts.callers import CALLER
from sidecar.shell.catalogue import Entered, Wanted
from sidecar.shell.gateway import Gateway
from sidecar.tasks import undisturbed

PUSHES_MAX = 8
"""Concurrent pushes: each holds a file open and up to one chunk in memory."""
SILENCE_S_MAX = 60.0


class Pushes:
    """Receive pushes for a gateway."""

    def __init__(self, gateway: Gateway, silence_s_max: float = SILENCE_S_MAX) -> None:
        self._gateway = gateway
        self._silence_s_max = silence_s_max
        self._under_way = 0

    async def receive(self, requests: AsyncIterator[Any]) -> Entered:
        """Receive one push, register its files and return the entry.

        Raises Refused for a protocol error or a client that is too slow, Invalid for a bad adapter.
        """
        if self._under_way >= PUSHES_MAX:
            raise Refused(Reason.QUEUE_FULL, f"{PUSHES_MAX} pushes are under way; push again later")
        self._under_way += 1
        try:
            return await self._receive(requests)
        finally:
            self._under_way -= 1

    async def _receive(self, requests: AsyncIterator[Any]) -> Entered:
        start = await self._start(requests)
        files = [PushedFile(file.name, file.size_bytes, file.sha256) for file in start.files]
        check_name(start.name)
        wanted = _wanted(start)
        wanted.check(start.name)
        sources = self._gateway.sources
        check_announced(start.name, files, sources.limits)
        with sources.incoming() as folder:
            receiver = Receiver(start.name, files, folder)
            try:
                await self._take_all(start.name, requests, receiver)
            finally:
                receiver.close()
            return await self._gateway.catalogue.push(start.name, folder, wanted)

    async def _start(self, requests: AsyncIterator[Any]) -> Any:
        first = await self._next(requests, "")
        if first is None or first.WhichOneof("part") != "start":
            raise wrong("", "the first message must be the start: the name and the files")
        return first.start

    async def _take_all(self, name: str, requests: AsyncIterator[Any], receiver: Receiver) -> None:
        while (message := await self._next(requests, name)) is not None:
            if message.WhichOneof("part") != "chunk":
                raise wrong(name, "after the start only chunks may follow")
            self._gateway.access.check(CALLER.get())  # its credential may end meanwhile
            chunk = message.chunk
            # Runs to its end even if the client leaves: only then is the file closed and the folder removed.
            await undisturbed(asyncio.to_thread(receiver.take, chunk.file, chunk.offset, chunk.data))
        await undisturbed(asyncio.to_thread(receiver.finish))

    async def _next(self, requests: AsyncIterator[Any], name: str) -> Any:
        """Return the next message; None at the end."""
        try:
            async with asyncio.timeout(self._silence_s_max):
                return await anext(requests, None)
        except TimeoutError as error:
            raise wrong(name, f"nothing came for {self._silence_s_max:g} s") from error


def _wanted(start: Any) -> Wanted:
    return Wanted(
        allow=tuple(start.allow),
        pin=start.pin,
        labels=tuple(sorted(start.labels.items())),
        stage=start.stage,
        managed_by="push",
        hold_s=start.hold_s,
        base=start.base,
    )
