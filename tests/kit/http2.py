"""A hostile HTTP/2 client of a gRPC listener: partial messages, resets, silent connections.

The frames are made by `h2`, which does not know gRPC.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived
from hpack import Encoder

GENERATE = "/lorasidecar.v1.Gateway/Generate"
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
FRAME_BYTES = 16384
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, RST_STREAM, SETTINGS, PING, ACK, END_HEADERS = 1, 3, 4, 6, 1, 4
LAST = b"the last"
"""What the ping after all resets carries."""


class RawConnection:
    """One connection. `ended` has the headers and trailers of each call that is over, by its stream's number."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ended: dict[int, dict[str, str]] = {}
        self._seen: dict[int, dict[str, str]] = {}
        self._reader = reader
        self._writer = writer
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self._h2.initiate_connection()
        self._moved = asyncio.Event()
        self.closed = asyncio.Event()
        """Set when the server has closed the connection."""
        self._flush()
        self._reading = asyncio.create_task(self._read())

    def begin(self, path: str, *metadata: tuple[str | bytes, str | bytes]) -> int:
        """Send a call's headers and return its stream's number."""
        stream = self._h2.get_next_available_stream_id()
        head = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "here")]
        self._h2.send_headers(stream, [*head, ("te", "trailers"), ("content-type", "application/grpc"), *metadata])
        self._flush()
        return stream

    async def send(self, stream: int, said_bytes: int, sent_bytes: int) -> None:
        """Send a message's length and some zero bytes of it; return when they are sent or the call is over."""
        left = bytearray(struct.pack(">BI", 0, said_bytes) + bytes(sent_bytes))
        while left and stream not in self.ended and not self.closed.is_set():
            size = min(self._h2.local_flow_control_window(stream), len(left), FRAME_BYTES)
            if size == 0:
                self._moved.clear()
                await self._moved.wait()
                continue
            self._h2.send_data(stream, bytes(left[:size]))
            del left[:size]
            self._flush()
            await self._writer.drain()

    async def send_whole(self, stream: int, message: bytes) -> None:
        self._h2.send_data(stream, struct.pack(">BI", 0, len(message)) + message, end_stream=True)
        self._flush()
        await self._writer.drain()

    def reset(self, stream: int) -> None:
        self._h2.reset_stream(stream, ErrorCodes.CANCEL)
        self._flush()

    async def is_over(self, stream: int) -> dict[str, str]:
        """Wait for a call's end and return its headers and trailers."""
        while stream not in self.ended and not self.closed.is_set():
            self._moved.clear()
            await self._moved.wait()
        return self.ended.get(stream, {})

    async def drained(self) -> None:
        """Wait until written bytes are sent, and let other tasks run."""
        with suppress(ConnectionError):
            await self._writer.drain()
        await asyncio.sleep(0)

    async def close(self) -> None:
        self._writer.transport.abort()
        await asyncio.wait([self._reading])

    def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(1 << 16):
                for event in self._h2.receive_data(data):
                    self._take(event)
                self._flush()
                self._moved.set()
        except (OSError, ConnectionError):
            pass
        self.closed.set()
        self._moved.set()

    def _take(self, event: Any) -> None:
        if isinstance(event, (ResponseReceived, TrailersReceived)):
            self._seen.setdefault(event.stream_id, {}).update(event.headers)
        elif isinstance(event, DataReceived):
            self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, StreamEnded):
            self.ended[event.stream_id] = self._seen.pop(event.stream_id, {})
        elif isinstance(event, StreamReset):
            self.ended.setdefault(event.stream_id, {"reset": str(event.error_code)})
        elif isinstance(event, ConnectionTerminated):
            self.closed.set()


@asynccontextmanager
async def raw_connection(address: str) -> AsyncIterator[RawConnection]:
    """Connect to HOST:PORT, without TLS."""
    host, _, port = address.rpartition(":")
    connection = RawConnection(*await asyncio.open_connection(host, int(port)))
    try:
        yield connection
    finally:
        await connection.close()


def rapid_resets(path: str, calls: int) -> bytes:
    """Return all that a client sends which begins calls and resets each at once, and a ping at the end."""
    headers = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "here"), ("te", "trailers")]
    encoder = Encoder()
    first, other = encoder.encode(headers), encoder.encode(headers)
    cancel = struct.pack(">I", ErrorCodes.CANCEL)
    sent = [PREFACE, _frame(SETTINGS, 0, 0), _frame(SETTINGS, ACK, 0)]
    for number in range(calls):
        stream = 2 * number + 1
        sent += [
            _frame(HEADERS, END_HEADERS, stream, other if number else first),
            _frame(RST_STREAM, 0, stream, cancel),
        ]
    return b"".join([*sent, _frame(PING, 0, 0, LAST)])


async def send_frames(address: str, frames: bytes) -> None:
    """Send frames that end with a ping on a connection; return when the server has read all, or cuts it off."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(frames)
        with suppress(OSError, asyncio.IncompleteReadError):
            while (head := await reader.readexactly(9))[3:5] != bytes((PING, ACK)):
                await reader.readexactly(int.from_bytes(head[:3]))
    finally:
        writer.transport.abort()


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload
