"""`POST /drain` on a loopback listener of its own: call it from the engine's preStop hook.

It is apart from the http listener, which clients reach, and needs no gRPC, which an engine's image may lack.
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
from sidecar.fronts.http.pages import without_pages

CONNECTIONS_MAX = 16


class HttpDrain:
    """One listener. A request is answered once `drain` returns, that is, when nothing runs any more.

    `answered` is called after the answer: the process must end then. Kubernetes also runs the hook before it restarts
    the engine alone, and the new engine would find a sidecar that takes no requests.

    `address` is HOST:PORT; with port 0 it has the port that was taken, once `start` has returned.
    """

    def __init__(self, drain: Callable[[], Awaitable[None]], answered: Callable[[], None], address: str) -> None:
        self.address = address
        self._drain = drain
        self._answered = answered
        app = Starlette(routes=[Route("/drain", self._drained, methods=["POST"])])
        self._listener = HttpListener(without_pages(app), HttpLimits(CONNECTIONS_MAX))

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
        end = BackgroundTask(self._end)
        return PlainTextResponse("drained\n", headers={"cache-control": "no-store"}, background=end)

    async def _end(self) -> None:
        self._answered()
