"""`Adapters.Push`: receive an adapter's files from a client, in chunks, into the spool."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

from sidecar.access.access import OURSELVES
from sidecar.adapters.names import check_name
from sidecar.adapters.pushed import PushedFile, Receiver, check_announced, wrong
from sidecar.errors import Reason, Refused
from sidecar.fronts.callers import CALLER, CHECKED_S
from sidecar.shell.catalogue import Entered, Wanted
from sidecar.shell.gateway import Gateway
from sidecar.tasks import undisturbed

PUSHES_MAX, PUSHES_OF_TENANT_MAX = 32, 4
"""Concurrent pushes: each holds a file open and up to one chunk in memory."""
SILENCE_S_MAX, LEAST_BYTES_S = 60.0, 64 << 10
"""How long a push may be silent, at a time and twice that in all but for a second for each `LEAST_BYTES_S`."""


class Pushes:
    """Receive pushes for a gateway."""

    def __init__(self, gateway: Gateway, silence_s_max: float = SILENCE_S_MAX) -> None:
        self._gateway = gateway
        self._silence_s_max = silence_s_max
        self._under_way: Counter[str] = Counter()
        """How many of each tenant are under way; callers without one, such as operators, count together."""

    async def receive(self, requests: AsyncIterator[Any]) -> Entered:
        """Receive one push, register its files and return the entry.

        Raises Refused for a protocol error or a client that is too slow, Invalid for a bad adapter.
        """
        tenant = CALLER.get(OURSELVES).principal.tenant
        if self._under_way.total() >= PUSHES_MAX:
            raise Refused(Reason.QUEUE_FULL, f"{PUSHES_MAX} pushes are under way; push again later")
        if tenant and self._under_way[tenant] >= PUSHES_OF_TENANT_MAX:
            text = f"{PUSHES_OF_TENANT_MAX} pushes of tenant {tenant} are under way; push again when one has ended"
            raise Refused(Reason.QUEUE_FULL, text)
        self._under_way[tenant] += 1
        try:
            return await self._receive(_Client(self._gateway, requests, self._silence_s_max))
        finally:
            self._under_way -= Counter([tenant])

    async def _receive(self, client: _Client) -> Entered:
        start = await self._start(client)
        files = [PushedFile(file.name, file.size_bytes, file.sha256) for file in start.files]
        check_name(start.name)
        wanted = _wanted(start)
        wanted.check(start.name)
        sources = self._gateway.sources
        check_announced(start.name, files, sources.limits)
        with sources.incoming() as folder:
            receiver = Receiver(start.name, files, folder)
            try:
                await self._take_all(start.name, client, receiver)
            finally:
                receiver.close()
            return await self._gateway.catalogue.push(start.name, folder, wanted)

    async def _start(self, client: _Client) -> Any:
        first = await client.next("")
        if first is None or first.WhichOneof("part") != "start":
            raise wrong("", "the first message must be the start: the name and the files")
        return first.start

    async def _take_all(self, name: str, client: _Client, receiver: Receiver) -> None:
        while (message := await client.next(name)) is not None:
            if message.WhichOneof("part") != "chunk":
                raise wrong(name, "after the start only chunks may follow")
            chunk = message.chunk
            # Runs to its end even if the client leaves: only then is the file closed and the folder removed.
            await undisturbed(asyncio.to_thread(receiver.take, chunk.file, chunk.offset, chunk.data))
        await undisturbed(asyncio.to_thread(receiver.finish))


class _Client:
    """Who pushes: its messages, for as long as its credential is good and it is quick enough."""

    def __init__(self, gateway: Gateway, requests: AsyncIterator[Any], silence_s_max: float) -> None:
        self._access = gateway.access
        self._caller = CALLER.get(OURSELVES)
        self._requests = requests
        self._silence_s_max, self._left_s = silence_s_max, 2 * silence_s_max

    async def next(self, name: str) -> Any:
        """Return the next message; None at the end. Raises SidecarError."""
        coming = asyncio.ensure_future(anext(self._requests, None))
        began_s = monotonic()
        try:
            while not coming.done():
                self._access.check(self._caller)
                waited_s = monotonic() - began_s
                if waited_s >= self._silence_s_max:
                    raise wrong(name, f"nothing came for {self._silence_s_max:g} s")
                if waited_s >= self._left_s:
                    why = f"it brings less than {LEAST_BYTES_S >> 10} KiB a second"
                    raise wrong(name, f"{why}; push over a faster connection, or register it from an origin")
                left_s = min(self._silence_s_max, self._left_s) - waited_s
                await asyncio.wait([coming], timeout=min(CHECKED_S, left_s))
        finally:
            coming.cancel()
        self._access.check(self._caller)
        message = coming.result()
        if message is not None:
            self._left_s += len(message.chunk.data) / LEAST_BYTES_S - (monotonic() - began_s)
        return message


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
