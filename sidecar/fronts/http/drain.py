"""`POST /drain` on a loopback listener of its own: who stops the engine of this pod asks first, and waits.

It is not on the http listener, where clients are, and needs no gRPC, which an engine's image may lack.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from sidecar.fronts.http.connection import HttpLimits
from sidecar.fronts.http.content_type import why_not_json
from sidecar.fronts.http.listener import HttpListener

CONNECTIONS_MAX = 16


class HttpDrain:
    """One listener. `drain` returns when nothing runs here any more; asked again it is waited for again.

    `answered` is called once somebody has been told: the process is to end then. Kubernetes asks also before it
    restarts an engine alone, and what came up again with the engine would find a sidecar that takes nothing.

    `address` is HOST:PORT; port 0 takes a free one, and `address` says which after `start`.
    """

    def __init__(self, drain: Callable[[], Awaitable[None]], answered: Callable[[], None], address: str) -> None:
        self.address = address
        self._drain = drain
        self._answered = answered
        app = Starlette(routes=[Route("/drain", self._drained, methods=["POST"])])
        self._listener = HttpListener(app, HttpLimits(CONNECTIONS_MAX))

    async def start(self) -> None:
        """Listen. Raises Misused(PORT_IN_USE) naming the address."""
        self.address = await self._listener.open(self.address, "drain")

    async def stop(self) -> None:
        await self._listener.stop()

    async def _drained(self, request: Request) -> Response:
        has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
        if has_body and (why := why_not_json(request.scope["headers"])):
            return PlainTextResponse(f"{why}, or no body\n", 415, {"cache-control": "no-store", "connection": "close"})
        await self._drain()
        told = BackgroundTask(self._end)
        return PlainTextResponse("drained\n", headers={"cache-control": "no-store"}, background=told)

    async def _end(self) -> None:
        self._answered()
