"""An HTTP server in the event loop of another program, on a socket that is bound before it starts."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from sidecar.lab.engine.engine import Engine
from sidecar.lab.engine.http.compute import ByContent, ByLlama
from sidecar.lab.engine.http.driver import EngineDied, TextDriver
from sidecar.lab.engine.http.json_text import as_json
from sidecar.lab.engine.http.options import HttpOptions
from sidecar.lab.engine.kserve.options import Options
from sidecar.lab.engine.kserve.served import Served, ServedLog
from sidecar.lab.engine.listening import bound_socket
from sidecar.lab.engine.spec import EngineSpec
from sidecar.pace.cost import A100_TABLE, CostModel

Endpoint = Callable[[Request], Awaitable[Response]]

_KEEP_ALIVE_S = 5
"""Both vLLM and trtllm-serve leave uvicorn's value."""


class HttpServer(uvicorn.Server):
    """A server that leaves signals alone."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def cut(self) -> None:
        """End at once, and close every connection, as the end of a process does."""
        self.should_exit = self.force_exit = True
        # uvicorn would listen until it looks at the flags.
        for listener in self.servers:
            listener.close()
        for connection in list(self.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close every connection, as the end of a process does.

        uvicorn closes the connections that are set up when the shutdown begins. A connection that was accepted just
        before is set up later; left open, it would answer for the dead engine for as long as its client keeps it.
        """
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def http_server(options: Options, app: ASGIApp) -> HttpServer:
    """Return a server of an application, with TLS if the options say so."""
    ca = options.tls_client_ca
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        ssl_certfile=options.tls_certificate,
        ssl_keyfile=options.tls_key,
        ssl_ca_certs=None if ca is None else str(ca),
        ssl_cert_reqs=ssl.CERT_NONE if ca is None else ssl.CERT_REQUIRED,
    )
    return HttpServer(config)


def as_response(content: Any, status: int = 200) -> Response:
    """Return a response with JSON."""
    return Response(as_json(content), status, media_type="application/json")


def application(
    posts: Mapping[str, Endpoint], gets: Mapping[str, Endpoint], handlers: Mapping[Any, Any] | None = None
) -> Starlette:
    """Return the application of these endpoints by path. `handlers` answer for exceptions."""
    routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()]
    routes += [Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()]
    return Starlette(routes=routes, exception_handlers={HTTPException: _framework_error, **(handlers or {})})


async def _framework_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = as_response({"detail": error.detail}, error.status_code)
    response.headers.update(error.headers or {})
    return response


def engine_of(options: HttpOptions, spec: EngineSpec, mixes: bool = False) -> tuple[Engine, ByContent | ByLlama]:
    """Return an engine, and what computes its tokens. With `mixes` its base requests are wrong beside adapters'."""
    compute = ByLlama(spec, options.seed, mixes) if options.computes else ByContent(spec, mixes)
    cost = CostModel.from_file(options.cost_table or A100_TABLE, options.time_scale, options.max_lora_rank)
    return Engine(spec, cost), compute


class EngineServer:
    """A running emulated engine behind an HTTP API; made by `started`. It ends by itself when its engine dies.

    A kind makes its `_log`, its `_driver`, whose engine this is, and its `_http` server.
    """

    _log: ServedLog
    _driver: TextDriver
    _http: HttpServer

    def __init__(self, options: Any, listening: socket.socket) -> None:
        self.options = options
        self._socket = listening
        self.http_address = f"{options.host}:{listening.getsockname()[1]}"

    @property
    def metrics_address(self) -> str:
        """Host and port of the metrics, which are those of the API."""
        return self.http_address

    @property
    def engine(self) -> Engine:
        """The engine model."""
        return self._driver.engine

    @property
    def served(self) -> list[Served]:
        """The endings so far, oldest first, load calls too; the last 100,000 are kept."""
        return list(self._log.last)

    async def start(self) -> None:
        """Start to take requests."""
        self._driving = asyncio.create_task(self._driver.run())
        self._serving = asyncio.create_task(self._http.serve(sockets=[self._socket]))
        while not self._http.started and not self._serving.done():
            await asyncio.sleep(0.001)
        if self._serving.done():
            self._serving.result()

    async def failed(self) -> None:
        """Wait until the server has ended because its engine died, and raise the cause: EngineDied or another error."""
        await asyncio.wait([self._serving])
        self._driving.result()

    async def stop(self, grace: float | None = None) -> None:
        """Accept nothing new, let running requests continue for `grace` seconds, then end them.

        Raises an error that ended the driver, except EngineDied, which a test may have caused on purpose.
        """
        self._http.should_exit = True
        await asyncio.wait([self._serving], timeout=grace or 0)
        self._hang_up()
        if not self._driving.done():
            self._driver.end_all()
            self._driving.cancel()
        endings = await asyncio.gather(self._driving, self._serving, return_exceptions=True)
        self._log.close()
        for ending in endings:
            if isinstance(ending, Exception) and not isinstance(ending, EngineDied):
                raise ending

    def _hang_up(self) -> None:
        """End what is still open."""
        self._http.cut()

    def _leave(self) -> None:
        """Stop listening and end when the last client has gone, as a first SIGINT does."""
        self._http.should_exit = True


Kind = TypeVar("Kind", bound=EngineServer)


async def started(kind: type[Kind], options: HttpOptions) -> Kind:
    """Start an emulated engine of a kind and return when it takes requests.

    Raises ValueError for options that contradict each other, OSError if a port is taken.
    """
    listening = bound_socket(options.host, options.http_port, "--http-port")
    try:
        server = kind(options, listening)
    except BaseException:
        listening.close()
        raise
    await server.start()
    return server
