"""A TCP forwarder that counts what passes, to see what is on the wire between the sidecar and an engine."""

from __future__ import annotations

import asyncio
from typing import Self


class Forwarder:
    """Forwards connections to an address; `sent_bytes` counts what went there, `received_bytes` what came back."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self.sent_bytes = self.received_bytes = 0
        self.address = ""
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            engine_reader, engine_writer = await asyncio.open_connection(self._host, int(self._port))
            await asyncio.gather(self._sending(reader, engine_writer), self._receiving(engine_reader, writer))
        except (ConnectionError, asyncio.CancelledError):
            writer.close()
        finally:
            self._connections.discard(task)

    async def _sending(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 18):
            self.sent_bytes += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()

    async def _receiving(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 18):
            self.received_bytes += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()
