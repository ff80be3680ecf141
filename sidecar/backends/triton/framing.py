"""gRPC's messages in the body of an HTTP/2 request, for what a proxy carries."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Mapping
from urllib.parse import unquote

import grpc

from sidecar.backends.wire import CODES

PREFIX = struct.Struct(">BI")
"""Before each message: whether it is compressed, and its length in bytes."""


class Compressed(Exception):
    """A message is compressed."""


class Frames:
    """Takes the bytes of a body as they come, and gives the messages that are complete."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def take(self, piece: bytes) -> list[bytes]:
        """Return the messages that are complete with these bytes. Raises Compressed."""
        data, found, begin = self._rest, [], 0
        data += piece  # in place: a large message may come in many pieces
        while len(data) - begin >= PREFIX.size:
            compressed, length = PREFIX.unpack_from(data, begin)
            if compressed:
                raise Compressed
            end = begin + PREFIX.size + length
            if len(data) < end:
                break
            found.append(bytes(data[begin + PREFIX.size : end]))
            begin = end
        del data[:begin]
        return found

    @property
    def size_bytes(self) -> int:
        """Bytes of the message that is not complete."""
        return len(self._rest)


def framed(message: bytes) -> bytes:
    return PREFIX.pack(0, len(message)) + message


async def messages_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the messages of a body. Raises Compressed."""
    frames = Frames()
    async for piece in pieces:
        for message in frames.take(piece):
            yield message


def status_in(headers: Mapping[str, str]) -> tuple[grpc.StatusCode | None, str]:
    """Return the status in a call's trailers, and its text; None if it has none."""
    number = headers.get("grpc-status", "")
    code = CODES.get(int(number), grpc.StatusCode.UNKNOWN) if number.isdigit() else None
    return code, unquote(headers.get("grpc-message", ""))
