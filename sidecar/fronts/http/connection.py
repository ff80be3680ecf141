"""One HTTP connection: uvicorn's, with bounds that uvicorn lacks.

They bound the size of a request's head, the time for it, the time that a client may be silent within a request, and the
bytes of a body that nobody reads. An answer also reaches a client whose request has not come in full.

When a listener is full, a new connection takes the place of the one that has longest had nothing answered, first of
those that never had a good answer. So connections keep others out only while as many requests are being answered.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from http import HTTPStatus
from time import monotonic
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from sidecar.access.certificates import names_of_tls
from sidecar.fronts.openai.errors import failure

CONNECTIONS_MAX = 4096
SPARE_CONNECTIONS = 64
"""Connections above the limit, so that probes still get in. The OpenAI API answers with a short refusal if more than
the limit have requests that are being answered."""
HEAD_BYTES_MAX = 16 << 10
HEAD_S_MAX = 10.0
"""From a connection's begin, or a further request's first byte, to the end of the request's head."""
SILENCE_S_MAX = 30.0
DISCARDED_BYTES_MAX = 64 << 20
"""Bytes of a body that is answered without being read; beyond that the connection is cut."""
PEER, CROWDED, CARRIER, SUBSET, CONNECTION = "peer", "crowded", "carrier", "subset", "connection"
"""Keys of a request's state: the names in the client's certificate; True if more requests are being answered than
planned; what carries it to its engine, if that is not this process; the addresses of engines that it may go to, if not
to all; the `Connection` that brought it.
"""

_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


@dataclass(frozen=True)
class HttpLimits:
    """Limits of a listener and of each of its connections."""

    connections: int = CONNECTIONS_MAX
    head_bytes: int = HEAD_BYTES_MAX
    silence_s: float = SILENCE_S_MAX
    head_s: float = HEAD_S_MAX


class _Refused(Exception):
    """The request is refused before it reaches the application."""


class Connection(HttpToolsProtocol):
    """One connection, with the bounds that uvicorn lacks."""

    limits: HttpLimits
    without_answer: tuple[dict[Connection, None], dict[Connection, None]]
    """The listener's connections of which no request is being answered, oldest first: those that are not proven, and
    those that are."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.proven = False
        """Its client has shown a certificate, or has been answered well."""
        self._in_head = True
        self._head_bytes = 0
        self._discarded_bytes = 0
        self._whole = False
        """The request that is being answered has come in full, so its client may be silent."""
        self._body_has_begun = self._closes = False
        self._heard_s = self._head_since_s = 0.0
        self._refusal: HTTPStatus | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._answered: RequestResponseCycle | None = None
        """The request whose answer is being made. `cycle` is the one read last, which may have to wait for it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        names = _peer_names(transport)
        self.app_state = {**self.app_state, PEER: names, CONNECTION: self}
        self.proven = bool(names)
        super().connection_made(transport)
        self._heard_s = self._head_since_s = monotonic()
        if len(self.connections) > self.limits.connections + SPARE_CONNECTIONS:
            oldest = next((each for group in self.without_answer for each in group), self)
            oldest._is_answered(True)
            oldest.transport.abort()
            if oldest is self:
                return
        self._is_answered(False)
        self._look()

    def _is_answered(self, answered: bool) -> None:
        """Note whether a request of this connection is being answered."""
        for group in self.without_answer:
            group.pop(self, None)
        if not answered:
            self.without_answer[self.proven][self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_answered(True)
        if self._watch is not None:
            self._watch.cancel()
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _look(self) -> None:
        """Close the connection if its client is silent within a request or before it, or takes long for a head."""
        now_s, head_s, silence_s = monotonic(), self.limits.head_s, self.limits.silence_s
        if self.transport.is_closing() or not (self._whole or self.flow.read_paused):
            silence_s += self._heard_s - now_s
        if self._in_head:
            head_s += self._head_since_s - now_s
        if min(silence_s, head_s) <= 0:
            self.transport.abort()
        else:
            self._watch = self.loop.call_later(min(silence_s, head_s), self._look)

    def data_received(self, data: bytes) -> None:
        self._heard_s = monotonic()
        was_in_head = self._in_head
        if was_in_head or self._whole:
            data = _without_upgrade(data)
        super().data_received(data)
        if was_in_head and self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.head_bytes:
                self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
                self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._whole, self._body_has_begun = True, False, False
        self._head_since_s = monotonic()
        self._head_bytes = self._discarded_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header, unless it follows the body: a proxy that checked the head has not seen such a trailer."""
        if self._in_head:
            super().on_header(name, value)
        self._count(len(name) + len(value) + 4)

    def _count(self, size_bytes: int) -> None:
        self._head_bytes += size_bytes
        if self._head_bytes > self.limits.head_bytes:
            self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise _Refused

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        if self.parser.get_http_version() == "1.1" and not any(name == b"host" for name, _ in self.headers):
            raise _Refused
        answered = len(self.connections) - sum(map(len, self.without_answer))
        self.scope["state"][CROWDED] = answered >= self.limits.connections
        super().on_headers_complete()
        self.cycle.transport = _Lingering(self)  # type: ignore[assignment]

    def close_politely(self) -> None:
        """Close, but only once the request has come: a client that still sends would lose its answer to a reset."""
        if self._whole or (self.expect_100_continue and not self._body_has_begun):
            self.transport.close()
        else:
            self._closes = True

    def on_body(self, body: bytes) -> None:
        self._body_has_begun = True
        super().on_body(body)
        if self.cycle.response_complete:
            self._discarded_bytes += len(body)
            if self._discarded_bytes > DISCARDED_BYTES_MAX:
                self.transport.abort()

    def on_message_complete(self) -> None:
        self._whole = True
        self.cycle.transport = self.transport
        super().on_message_complete()
        if not self.cycle.response_complete:
            self._is_answered(True)
        if self._closes:
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:
            self._is_answered(False)
        if self.transport.is_closing():
            self._heard_s = monotonic()  # it closes once the client has read everything; limit the time for that

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Answer a malformed or refused request; uvicorn would always send 400."""
        status = self._refusal or HTTPStatus.BAD_REQUEST
        body = failure(status, f"this is not a request of HTTP/1.1: {status.phrase}", "invalid_request").body
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()


class _Lingering:
    """The transport that an answer is given while its request is still coming."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        self._connection.close_politely()


def _without_upgrade(data: bytes) -> bytes:
    """Return a request's head with its Upgrade header renamed, since uvicorn would lose the body otherwise.

    A server may ignore that header, and clients that send it (Java's among them) continue with HTTP/1.1.
    """
    found = _UPGRADE.search(data, 0, HEAD_BYTES_MAX)
    if found is None or -1 < data.find(b"\r\n\r\n", 0, HEAD_BYTES_MAX) < found.start():
        return data
    return data[: found.start()] + b"\r\nx-upgrade:" + data[found.end() :]


def _peer_names(transport: asyncio.Transport) -> tuple[str, ...]:
    """Return the names in the client's certificate."""
    tls = transport.get_extra_info("ssl_object")
    return () if tls is None else names_of_tls(tls.getpeercert())
