"""HTTP/1.1 to engines, by aiohttp: its errors in our words, requests and answers that something else may carry.

A server that hangs up has ended, and one that says nothing hangs. What follows differs, so the errors do.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp

from policies.record import record

PIECE_BYTES = 1 << 18
"""Bytes that are copied and sent at once. A larger body is sent in pieces, between which other tasks run."""
JSON = {"content-type": "application/json"}


class WireError(Exception):
    """A server was not reached, or did not answer to the end."""


class NotReached(WireError):
    """There was no connection."""


class TimedOut(WireError):
    """It took no connection, or said nothing, in time."""


class ProxyTimedOut(TimedOut):
    """The proxy that carried a request has given it up."""


WORDS: tuple[tuple[type[Exception], type[WireError], str], ...] = (
    (aiohttp.ConnectionTimeoutError, TimedOut, "it took no connection in time"),
    (aiohttp.ServerTimeoutError, TimedOut, "it said nothing in time"),
    (aiohttp.ClientConnectorError, NotReached, "no connection: {cause}"),
    (aiohttp.ServerDisconnectedError, WireError, "it hung up before it had answered"),
    (aiohttp.ClientPayloadError, WireError, "it hung up in the middle of its answer"),
    (aiohttp.ClientOSError, WireError, "the connection broke: {cause}"),
    (aiohttp.InvalidURL, WireError, "its address is no URL"),
    (aiohttp.ClientError, WireError, "what it says is not HTTP"),
    (OSError, WireError, "the connection broke: {cause}"),
)
"""What aiohttp raises, as we call it and in words; the first that fits. A subclass comes before its base."""


@dataclass(frozen=True, slots=True)
class Request:
    """A POST to an engine. `address` is HOST:PORT, `path` has the query, `body` is its parts in order."""

    address: str
    path: str
    headers: Mapping[str, str]
    body: Sequence[bytes]
    is_encrypted: bool = False

    @classmethod
    def to_url(cls, url: str, headers: Mapping[str, str], body: bytes) -> Request:
        parts = urlsplit(url)
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        return cls(parts.netloc, path, headers, (body,), parts.scheme == "https")

    @property
    def url(self) -> str:
        return f"{'https' if self.is_encrypted else 'http'}://{self.address}{self.path}"

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.body))


class Ending(Enum):
    """How an answer ended that nobody here has read."""

    WHOLE = "whole"
    CLIENT_LEFT = "client left"
    LATE = "late"
    BROKE = "broke"
    LOST = "lost"
    """Nobody can tell."""


@record(frozen=True, slots=True)
class Sighting:
    """What is seen of an answer from outside: the bytes of its body so far, and how it ended; None before its end.

    `cause` says why it did not end well.
    """

    body_bytes: int
    ending: Ending | None
    cause: str = ""


class Unseen(Protocol):
    """An answer of which the rest goes past this process, if `goes_on`."""

    goes_on: bool
    told_s: float
    """When something was seen of it last."""
    on_progress: Callable[[Sighting], None] | None
    """Called with what is seen before its end, which `next` does not return then."""

    @property
    def tells(self) -> bool:
        """True if something is seen of it every second or two while it goes on."""

    @property
    def is_lost(self) -> bool:
        """True if more is told of other answers, and nothing of this one for so long that its end must be lost."""

    async def next(self) -> Sighting:
        """Return the next thing that is seen of it. It may never come."""

    def close(self) -> None:
        """Wait for nothing more of it."""


@dataclass(slots=True)
class Answer:
    """An answer whose body comes in `chunks`, which raise WireError.

    Three more things are known of an answer that a proxy carries. Nobody here can read its body if it `is_unread`.
    `unseen` tells how an answer goes on that may go past this process. `trailers` are those of a gRPC call, once its
    body has been read. Such an answer has its headers' names in lower case.
    """

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]
    is_unread: bool = False
    unseen: Unseen | None = None
    trailers: Mapping[str, str] = field(default_factory=dict)
    source: aiohttp.ClientResponse | None = None

    async def read(self) -> bytes:
        """Return the whole body."""
        return b"".join([chunk async for chunk in self.chunks])

    def close(self) -> None:
        """Hang up, unless all of it has come."""
        if self.source is not None:
            self.source.close()


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer to a question."""

    status: int
    body: bytes

    @property
    def is_ok(self) -> bool:
        return HTTPStatus.OK <= self.status < HTTPStatus.MULTIPLE_CHOICES

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        """Return what the body says. Raises ValueError if it is no JSON."""
        return json.loads(self.body)


async def chunks_of(*chunks: bytes) -> AsyncIterator[bytes]:
    """Yield the chunks of a body that is here already."""
    for chunk in chunks:
        yield chunk


def joined(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return headers by name in lower case; several of one name are one list."""
    found: dict[str, str] = {}
    for name, value in pairs:
        name = name.lower()
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


class HttpClient:
    """Connections to one server, as many as there are requests; idle ones are kept for `kept_s`.

    `address` is HOST:PORT; with "" paths are URLs. `headers` go with each request.
    """

    def __init__(
        self,
        address: str,
        tls: ssl.SSLContext | None = None,
        headers: Mapping[str, str] | None = None,
        kept_s: float = 2.0,
        connect_s: float = 5.0,
    ) -> None:
        self.address = address
        self.url = f"{'http' if tls is None else 'https'}://{address}" if address else ""
        self.is_closed = False
        self._tls = tls
        self._headers = headers or {}
        self._kept_s = kept_s
        self._patient = aiohttp.ClientTimeout(sock_connect=connect_s)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> HttpClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def request(self, path: str, headers: Mapping[str, str], body: Sequence[bytes]) -> Request:
        """Return a request, for `send` or for a proxy to carry."""
        return Request(self.address, path, {**self._headers, **headers}, body, self._tls is not None)

    async def send(self, request: Request) -> Answer:
        """Send a request, and return its answer once its head has come. Wait for it without a limit."""
        size_bytes = request.size_bytes
        whole = size_bytes <= PIECE_BYTES
        headers = request.headers if whole else {**request.headers, "content-length": str(size_bytes)}
        answer = await self._asked(
            "POST", request.url, headers, b"".join(request.body) if whole else _in_pieces(request.body), self._patient
        )
        return Answer(answer.status, answer.headers, _body_of(answer), source=answer)

    async def get(self, path: str, timeout_s: float, headers: Mapping[str, str] | None = None) -> Reply:
        return await self._whole("GET", path, headers or {}, None, timeout_s)

    async def post(self, path: str, record: Any, timeout_s: float, headers: Mapping[str, str] | None = None) -> Reply:
        """Send a record as JSON."""
        return await self._whole("POST", path, {**JSON, **(headers or {})}, json.dumps(record).encode(), timeout_s)

    async def delete(self, path: str, timeout_s: float, headers: Mapping[str, str] | None = None) -> Reply:
        return await self._whole("DELETE", path, headers or {}, None, timeout_s)

    async def post_pieces(
        self, path: str, pieces: Iterator[bytes], size_bytes: int, headers: Mapping[str, str], timeout_s: float
    ) -> Reply:
        """Send a body that is made while it is sent."""

        async def body() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece

        return await self._whole("POST", path, {**headers, "content-length": str(size_bytes)}, body(), timeout_s)

    async def close(self) -> None:
        self.is_closed = True
        if self._session is not None:
            await self._session.close()

    async def _whole(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | AsyncIterator[bytes] | None,
        timeout_s: float,
    ) -> Reply:
        timeout = aiohttp.ClientTimeout(sock_connect=timeout_s, sock_read=timeout_s)
        answer = await self._asked(method, self.url + path, {**self._headers, **headers}, body, timeout)
        try:
            with in_our_words():
                return Reply(answer.status, await answer.read())
        finally:
            answer.close()

    async def _asked(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes | AsyncIterator[bytes] | None,
        timeout: aiohttp.ClientTimeout,
    ) -> aiohttp.ClientResponse:
        if self._session is None:
            self._session = self._open()  # not before: it needs the running loop
        with in_our_words():
            return await self._session.request(
                method, url, headers=headers, data=body, allow_redirects=False, timeout=timeout
            )

    def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=0,
            keepalive_timeout=self._kept_s,
            ssl=True if self._tls is None else self._tls,
            use_dns_cache=False,  # an engine that comes back may have another address
        )
        return aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"accept": "*/*", "user-agent": "lora-sidecar"},
            skip_auto_headers=("content-type", "accept-encoding"),
        )


async def _body_of(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    with in_our_words():
        while chunk := await answer.content.readany():
            yield chunk


async def _in_pieces(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        for begin in range(0, len(part), PIECE_BYTES):
            yield part[begin : begin + PIECE_BYTES]


@contextmanager
def in_our_words() -> Iterator[None]:
    """Raise WireError for what aiohttp raises."""
    try:
        yield
    except (aiohttp.ClientError, OSError) as error:
        found, words = next((ours, words) for theirs, ours, words in WORDS if isinstance(error, theirs))
        raise found(words.format(cause=_cause(error))) from error


def _cause(error: Exception) -> str:
    """Return what the system or TLS says, without the address."""
    cause = getattr(error, "certificate_error", None) or getattr(error, "os_error", error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted, {cause.verify_message}"
    if isinstance(cause, ssl.SSLError):
        return "it does not speak TLS" if cause.reason == "WRONG_VERSION_NUMBER" else f"TLS failed, {cause.reason}"
    known = isinstance(cause, OSError) and not isinstance(cause, socket.gaierror) and cause.errno
    return os.strerror(known) if known else str(getattr(cause, "strerror", None) or cause)
