"""Reach HTTP engines by aiohttp under httpx's interface.

httpx reads a chunk of an answer through nine generators and a parser in Python, which is half of what a relayed event
costs. aiohttp parses in C and hands over what has come. The package httpx-aiohttp does the same, but reports a server
that hangs up as a timeout, and here that is the difference between an engine that has ended and one that hangs.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import aiohttp
import httpx

from sidecar.backends.api import Carrier

CARRIER = "carrier"
"""The extension of a request that says what takes it to the server; None for this process itself."""
ERRORS: tuple[tuple[type[Exception], type[httpx.HTTPError], str], ...] = (
    (aiohttp.ConnectionTimeoutError, httpx.ConnectTimeout, "it took no connection in time"),
    (aiohttp.ServerTimeoutError, httpx.ReadTimeout, "it said nothing in time"),
    (aiohttp.ClientConnectorError, httpx.ConnectError, "no connection: {cause}"),
    (aiohttp.ServerDisconnectedError, httpx.RemoteProtocolError, "it hung up before it had answered"),
    (aiohttp.ClientPayloadError, httpx.RemoteProtocolError, "it hung up in the middle of its answer"),
    (aiohttp.ClientOSError, httpx.ReadError, "the connection broke: {cause}"),
    (aiohttp.ClientError, httpx.RemoteProtocolError, "what it says is not HTTP"),
    (OSError, httpx.WriteError, "the connection broke: {cause}"),
)
"""What aiohttp raises, as httpx calls it and in words; the first that fits. A subclass comes before its base.
"""


class EngineTransport(httpx.AsyncBaseTransport):
    """HTTP/1.1 to one server, by as many connections as there are requests; idle ones are kept for `kept_s`."""

    def __init__(self, tls: ssl.SSLContext | None, kept_s: float) -> None:
        self._tls = tls
        self._kept_s = kept_s
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        carrier: Carrier | None = request.extensions.get(CARRIER)
        if carrier is not None and (carried := await carrier.carry(request)) is not None:
            return carried
        if self._session is None:
            self._session = self._open()  # not before: it needs the running loop
        request.headers.pop("transfer-encoding", None)  # aiohttp sets it, and refuses to find it
        limits = request.extensions["timeout"]
        timeout = aiohttp.ClientTimeout(sock_connect=limits["connect"], sock_read=limits["read"])
        with _errors_of_httpx():
            answer = await self._session.request(
                request.method,
                str(request.url),
                headers=request.headers,
                data=_body(request),
                allow_redirects=False,
                timeout=timeout,
            )
        return httpx.Response(answer.status, headers=list(answer.raw_headers), stream=_Chunks(answer))

    def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=0,
            keepalive_timeout=self._kept_s,
            ssl=True if self._tls is None else self._tls,
            use_dns_cache=False,  # an engine that comes back may have another address
        )
        return aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,  # httpx does it
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("content-type", "accept-encoding", "user-agent"),
        )

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()


class _Chunks(httpx.AsyncByteStream):
    """An answer's body as it comes."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _errors_of_httpx():
            async for chunk in self._answer.content.iter_any():
                yield chunk

    async def aclose(self) -> None:
        self._answer.close()  # an answer that is complete has given its connection back already


def _body(request: httpx.Request) -> bytes | httpx.AsyncByteStream | None:
    try:
        return request.content or None
    except httpx.RequestNotRead:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        return request.stream


@contextmanager
def _errors_of_httpx() -> Iterator[None]:
    try:
        yield
    except (aiohttp.ClientError, OSError) as error:
        found, words = next((ours, words) for theirs, ours, words in ERRORS if isinstance(error, theirs))
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
