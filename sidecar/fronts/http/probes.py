"""`/livez`, `/readyz`, `/metrics` and `/metrics/model-server` on a listener of their own.

Clients cannot exhaust it, and do not see the names of adapters and tenants. It runs on the event loop that serves
requests, so an answer of `/livez` proves that the loop makes progress. Each connection is closed with its answer, and a
new one replaces a silent one, so few connections suffice.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from sidecar.config.listeners import is_local
from sidecar.core.state import Backend
from sidecar.fronts.http.connection import HttpLimits
from sidecar.fronts.http.listener import HttpListener
from sidecar.fronts.http.pages import without_pages
from sidecar.shell.gateway import Gateway
from sidecar.shell.metrics import Metrics
from sidecar.telling.endings import ADD_BACKEND

IDLE_SHARE = 20
"""A page that took a second is told again for so many. Endpoint pickers ask every 50 ms, each of them."""
SILENCE_S_MAX = 5.0
"""How long a connection may be silent before its request; a probe asks at once."""
METRICS, MODEL_SERVER, LIVE, READY = PATHS = ("/metrics", "/metrics/model-server", "/livez", "/readyz")
UNREADY = "no request can be served now; operators find the reason at /readyz of listeners.probes, or in the log"
"""What is said where not everybody may know of engines."""
NO_STORE = {"cache-control": "no-store"}
Page = tuple[str, bytes]
"""Content type and text."""


def why_not_ready(gateway: Gateway) -> str:
    """Return why no request can be served now; "" if one can."""
    state = gateway.state
    if gateway.crash.raised is not None:
        return "the sidecar has failed and ends; its log says why"
    if state.draining:
        return "the sidecar is shutting down"
    if not state.backends and state.config.pools:
        return f"no engine has been found yet in {', '.join(state.config.pools)}"
    if not state.backends:
        return f"no engine is configured; {ADD_BACKEND}"
    if gateway.takes_requests:
        return ""
    return "no backend takes requests: " + "; ".join(_why_not(gateway, backend) for backend in state.backends.values())


def _why_not(gateway: Gateway, backend: Backend) -> str:
    if backend.draining:
        return f"{backend.id} is {backend.drain_word}"
    if backend.leaving:
        return f"{backend.id} is about to go"
    if not backend.owned:
        return f"{backend.id} is served by no replica yet"
    return f"{backend.id} is down ({_detail(gateway, backend.id)})"


def _detail(gateway: Gateway, backend: str) -> str:
    known = gateway.backends.get(backend)
    return known.detail() if known is not None else "not started"


class Kept:
    """Renders a page, and gives it again for a while, so that who asks often takes at most a twentieth of a core."""

    def __init__(self, render: Callable[[str], Awaitable[Page]], clock: Callable[[], float] = monotonic) -> None:
        self._render = render
        self._clock = clock
        self._asking = asyncio.Lock()
        self._page: Page = ("", b"")
        self._accept = ""
        self._until_s = 0.0

    async def page(self, accept: str) -> Page:
        """Return content type and text in the format that an Accept header asks for."""
        async with self._asking:
            begun_s = self._clock()
            if begun_s >= self._until_s or accept != self._accept:
                self._page, self._accept = await self._render(accept), accept
                ended_s = self._clock()
                self._until_s = ended_s + IDLE_SHARE * (ended_s - begun_s)
            return self._page


class Probes:
    """An ASGI application with the paths. What readiness says names engines, where `shows_engines` allows that."""

    def __init__(self, gateway: Gateway, metrics: Metrics, shows_engines: bool = True) -> None:
        self._gateway = gateway
        self._metrics = metrics
        self._shows_engines = shows_engines
        self._model_server = Kept(metrics.model_server.render)
        shown = (self._show_metrics, self._show_model_server, self._show_live, self._show_ready)
        endpoints = zip(PATHS, shown, strict=True)
        self._router = Router([Route(path, endpoint, methods=["GET"]) for path, endpoint in endpoints])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._router({**scope, "app": self}, receive, send)
        except HTTPException as error:
            hint = f"there are {', '.join(PATHS)}, to be read with GET"
            await text_response(error.status_code, hint, error.headers)(scope, receive, send)

    async def _show_metrics(self, request: Request) -> Response:
        return _page(*await self._metrics.render(request.headers.get("accept", "")))

    async def _show_model_server(self, request: Request) -> Response:
        return _page(*await self._model_server.page(request.headers.get("accept", "")))

    async def _show_live(self, request: Request) -> Response:
        return text_response(200, "ok")

    async def _show_ready(self, request: Request) -> Response:
        why = why_not_ready(self._gateway)
        if why and not self._shows_engines:
            why = UNREADY
        return text_response(503, why) if why else text_response(200, "ok")


class HttpProbes:
    """The listener. `address` is HOST:PORT; with port 0 it has the port that was taken, once `start` has returned."""

    def __init__(self, probes: Probes, address: str, connections: int, tls: ssl.SSLContext | None = None) -> None:
        self.address = address
        self._probes = probes
        app = without_pages(self._serve, any_host=tls is not None) if is_local(address) else self._serve
        self._listener = HttpListener(app, HttpLimits(connections, silence_s=SILENCE_S_MAX), tls)

    async def start(self) -> None:
        """Listen. Raises Misused(PORT_IN_USE) naming the address."""
        self.address = await self._listener.open(self.address, "probes")

    async def stop(self) -> None:
        await self._listener.stop()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        await self._probes(scope, receive, closing)


def _page(content_type: str, body: bytes) -> Response:
    return Response(body, headers=NO_STORE | {"content-type": content_type})


def text_response(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    return PlainTextResponse(f"{sentence}\n", status, NO_STORE | dict(headers or {}))
