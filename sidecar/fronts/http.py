"""The http listener: `/metrics` for Prometheus, `/livez` and `/readyz` for whoever starts and stops the process.

KServe's REST paths are answered, too: with where gRPC is (`http_rest`).

It runs on the event loop that serves requests, so an answer of `/livez` is the proof that the loop makes progress.
HTTP itself is h11's business; connections, their number and how long they may be silent are bounded here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import h11

from sidecar.errors import Misused, Reason
from sidecar.fronts.http_rest import is_rest, rest_answer
from sidecar.shell.gateway import Gateway
from sidecar.shell.metrics import Metrics

logger = logging.getLogger(__name__)

CONNECTIONS_MAX = 64
HEAD_BYTES_MAX = 16 << 10
BODY_BYTES_MAX = 64 << 10
SILENCE_S_MAX = 30.0
READ_BYTES = 16 << 10
DISCARDED_BYTES_MAX = 64 << 20
PLAIN = "text/plain; charset=utf-8"


@dataclass(frozen=True)
class Answer:
    """`whatever_body` says that the answer is the same for a body that is too long to be read."""

    status: int
    body: bytes
    content_type: str = PLAIN
    headers: tuple[tuple[str, str], ...] = ()
    whatever_body: bool = False


def _text(status: int, sentence: str) -> Answer:
    return Answer(status, f"{sentence}\n".encode())


def why_not_ready(gateway: Gateway) -> str:
    """Say why nothing can be served now; "" when something can."""
    state = gateway.state
    if state.draining:
        return "the sidecar is shutting down"
    if not state.backends:
        return "no backend is configured; start the sidecar with --backend triton://HOST:PORT"
    if any(backend.takes_requests for backend in state.backends.values()):
        return ""
    places = [
        f"{backend.id} is draining" if backend.draining else f"{backend.id} is down ({_detail(gateway, backend.id)})"
        for backend in state.backends.values()
    ]
    return "no backend takes requests: " + "; ".join(places)


def _detail(gateway: Gateway, backend: str) -> str:
    known = gateway.backends.get(backend)
    return known.detail() if known is not None else "not started"


class HttpFront:
    """One listener. `address` is HOST:PORT; port 0 takes a free one, and `address` says which after `start`.

    `grpc_address` is the data listener's, for those who look for inference here.
    """

    def __init__(self, gateway: Gateway, metrics: Metrics, address: str, grpc_address: str) -> None:
        self._gateway = gateway
        self._metrics = metrics
        self.address = address
        self._grpc_address = grpc_address
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], None] = {}
        self._routes: dict[str, Callable[[h11.Request], Awaitable[Answer]]] = {
            "/metrics": self._show_metrics,
            "/livez": self._show_live,
            "/readyz": self._show_ready,
        }

    async def start(self) -> None:
        """Listen. Raises Misused(PORT_IN_USE) naming the address."""
        host, _, port = self.address.rpartition(":")
        try:
            self._server = await asyncio.start_server(self._accept, host.strip("[]") or None, int(port))
        except (OSError, ValueError, OverflowError) as error:
            raise Misused(
                Reason.PORT_IN_USE,
                f"the http listener cannot have {self.address} ({error}): another process has the port, or the "
                "address is not this machine's; choose another with listeners.http.address",
            ) from error
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"
        self._metrics.start()

    async def stop(self) -> None:
        """Stop listening and end what is open. Nothing happens when it does not listen."""
        if self._server is None:
            return
        self._metrics.stop()
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= CONNECTIONS_MAX:
            writer.close()
            return
        self._connections[task] = None
        try:
            await Conversation(reader, writer, self._answer).run()
        except (ConnectionError, TimeoutError) as error:
            logger.debug("an http connection ended: %r", error)
        except asyncio.CancelledError:
            return  # the listener stops; nobody waits for this task's result
        finally:
            del self._connections[task]
            writer.close()

    async def _answer(self, request: h11.Request) -> Answer:
        path = request.target.partition(b"?")[0].decode("ascii", "replace")
        if is_rest(path):
            return self._answer_rest(request.method.decode("ascii", "replace"), path)
        route = self._routes.get(path)
        if route is None:
            return _text(404, f"nothing is here; there are {', '.join(self._routes)}")
        if request.method not in (b"GET", b"HEAD"):
            refused = _text(405, f"{path} is to be read with GET")
            return Answer(405, refused.body, headers=(("allow", "GET, HEAD"),))
        return await route(request)

    def _answer_rest(self, method: str, path: str) -> Answer:
        rest = rest_answer(method, path, self._grpc_address)
        allow = (("allow", rest.allow),) if rest.allow else ()
        return Answer(rest.status, rest.body, "application/json", allow, whatever_body=True)

    async def _show_metrics(self, request: h11.Request) -> Answer:
        accept = next((value for name, value in request.headers if name == b"accept"), b"")
        content_type, body = await self._metrics.render(accept.decode("latin-1"))
        return Answer(200, body, content_type)

    async def _show_live(self, request: h11.Request) -> Answer:
        return _text(200, "ok")

    async def _show_ready(self, request: h11.Request) -> Answer:
        why = why_not_ready(self._gateway)
        return _text(503, why) if why else _text(200, "ok")


class Conversation:
    """One connection: requests answered one after another, until the client has had enough or breaks the rules."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answer: Callable[[h11.Request], Awaitable[Answer]],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._answer = answer
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
        self._body_is_too_long = False

    async def run(self) -> None:
        try:
            while (request := await self._request()) is not None:
                answer = await self._answer(request)
                if self._body_is_too_long and not answer.whatever_body:
                    raise h11.RemoteProtocolError("the body is too long", error_status_hint=413)
                await self._send(request, answer)
                if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                    break
                self._http.start_next_cycle()
        except h11.RemoteProtocolError as error:
            await self._refuse(error)
        if self._body_is_too_long:
            await self._discard()

    async def _request(self) -> h11.Request | None:
        """Return the next request; None at the end of the connection.

        Its body is read and thrown away, unless it is too long or its client waits for a word before it sends it.
        """
        request: h11.Request | None = None
        body_bytes = 0
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                async with asyncio.timeout(SILENCE_S_MAX):
                    self._http.receive_data(await self._reader.read(READ_BYTES))
            elif isinstance(event, h11.Request):
                request = event
                if self._http.they_are_waiting_for_100_continue:
                    return request
            elif isinstance(event, h11.Data):
                body_bytes += len(event.data)
                if body_bytes > BODY_BYTES_MAX:
                    self._body_is_too_long = True
                    return request
            elif isinstance(event, h11.EndOfMessage):
                return request
            else:
                return None

    async def _discard(self) -> None:
        """Take what the client still sends: to close on it would reset the connection before the answer is read."""
        self._writer.write_eof()
        left = DISCARDED_BYTES_MAX
        async with asyncio.timeout(SILENCE_S_MAX):
            while left > 0 and (data := await self._reader.read(READ_BYTES)):
                left -= len(data)

    async def _send(self, request: h11.Request | None, answer: Answer) -> None:
        headers = [
            ("content-type", answer.content_type),
            ("content-length", str(len(answer.body))),
            ("cache-control", "no-store"),
            *answer.headers,
        ]
        pieces = [self._http.send(h11.Response(status_code=answer.status, headers=headers))]
        if request is None or request.method != b"HEAD":
            pieces.append(self._http.send(h11.Data(data=answer.body)))
        pieces.append(self._http.send(h11.EndOfMessage()))
        self._writer.write(b"".join(piece for piece in pieces if piece))
        async with asyncio.timeout(SILENCE_S_MAX):
            await self._writer.drain()

    async def _refuse(self, error: h11.RemoteProtocolError) -> None:
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self._send(None, _text(error.error_status_hint, f"not a request: {error}"))
