"""Start and stop an emulated trtllm-serve.

The routes of an emulated trtllm-serve, and one of the emulator's own: `GET /emulator`.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from sidecar.lab.engine.engine import Engine
from sidecar.lab.engine.http.compute import ByContent, ByLlama
from sidecar.lab.engine.http.driver import EngineDied
from sidecar.lab.engine.http.json_text import as_json
from sidecar.lab.engine.http.server import http_server
from sidecar.lab.engine.kserve.faults import Faults
from sidecar.lab.engine.kserve.served import Served, ServedLog
from sidecar.lab.engine.listening import bound_socket
from sidecar.lab.engine.trtllm.adapters import Adapters
from sidecar.lab.engine.trtllm.driver import TorchDriver
from sidecar.lab.engine.trtllm.errors import ServerFault
from sidecar.lab.engine.trtllm.options import VERSIONS, TrtllmOptions, trtllm_spec_of
from sidecar.lab.engine.trtllm.serving import Serving
from sidecar.lab.engine.trtllm.stats import IterationStats
from sidecar.pace.cost import A100_TABLE, CostModel

UNAVAILABLE = "LLM is unavailable. Please check the server logs for more details."

Endpoint = Callable[[Request], Awaitable[Response]]


class Routes:
    """The endpoints. `leave` lets the server end once its clients have gone."""

    def __init__(
        self,
        options: TrtllmOptions,
        serving: Serving,
        driver: TorchDriver,
        stats: IterationStats,
        adapters: Adapters,
        leave: Callable[[], None],
    ) -> None:
        self._options = options
        self._serving = serving
        self._driver = driver
        self._stats = stats
        self._adapters = adapters
        self._leave = leave

    def app(self) -> Starlette:
        """Return the application."""
        posts = {"/v1/completions": self._serving.complete, "/v1/chat/completions": self._serving.chat}
        posts |= {"/kv_cache_events": self._kv_cache_events}
        gets = {"/v1/models": self._models, "/health": self._health, "/health_generate": self._health_generate}
        gets |= {"/version": self._version, "/metrics": self._metrics, "/emulator": self._emulator}
        if self._options.is_main:
            gets["/server_info"] = self._server_info
        if self._options.perf_metrics:
            gets["/prometheus/metrics"] = self._prometheus
        routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()]
        routes += [Route(path, endpoint, methods=["GET"]) for path, endpoint in gets.items()]
        return Starlette(routes=routes, exception_handlers={HTTPException: _framework_error, ServerFault: _fault})

    async def _models(self, request: Request) -> Response:
        card = {"id": self._options.model_name, "object": "model", "created": int(time.time())}
        return _json({"object": "list", "data": [card | {"owned_by": "tensorrt_llm"}]})

    async def _health(self, request: Request) -> Response:
        if not self._driver.is_dead or not self._options.is_main:
            return Response()
        self._leave()
        return Response(UNAVAILABLE, 503)

    async def _health_generate(self, request: Request) -> Response:
        status, text = await self._serving.try_base()
        return Response(text, status)

    async def _version(self, request: Request) -> Response:
        return _json({"version": VERSIONS[self._options.era]})

    async def _server_info(self, request: Request) -> Response:
        return _json({"disaggregated_params": None, "max_batch_size": self._options.seats})

    async def _metrics(self, request: Request) -> Response:
        # With the Prometheus collector main drains the statistics itself, so there is nothing to wait for.
        waits = not (self._options.is_main and self._options.perf_metrics)
        return _json(await (self._stats.drain() if waits else self._stats.drain(0)))

    async def _kv_cache_events(self, request: Request) -> Response:
        return _json([])

    async def _prometheus(self, request: Request) -> Response:
        registry, counters = CollectorRegistry(), self._driver.engine.counters
        used = counters.kv_used_blocks / counters.kv_max_blocks if counters.kv_max_blocks else 0.0
        values = {
            "trtllm_num_requests_running": counters.scheduled,
            "trtllm_num_requests_waiting": counters.waiting + counters.active - counters.scheduled,
            "trtllm_kv_cache_utilization": used,
        }
        for name, value in values.items():
            gauge = Gauge(name, name, ("engine_type", "model_name"), registry=registry)
            gauge.labels("undefined", "undefined").set(value)
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _emulator(self, request: Request) -> Response:
        """Return what no route of the real server tells: what it keeps of adapters, and why its loop has ended."""
        counters = self._driver.engine.counters
        shown = {
            "ids": len(self._adapters.submitted),
            "host_bytes": self._adapters.size_bytes,
            "active": counters.active,
            "waiting": counters.waiting,
            "iterations": counters.iteration_counter,
            "host_pages_used": counters.host_pages_used,
            "device_pages_used": counters.device_pages_used,
            "most_adapters": self._driver.most_adapters,
            "died": self._driver.engine.died,
        }
        return _json(shown)


def _json(content: Any, status: int = 200) -> Response:
    return Response(as_json(content), status, media_type="application/json")


async def _framework_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _json({"detail": error.detail}, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _fault(request: Request, error: Exception) -> Response:
    return PlainTextResponse("Internal Server Error", 500)


class TrtllmServer:
    """A running emulated trtllm-serve; made by `serve_trtllm`. Some ends of its engine end it too."""

    def __init__(self, options: TrtllmOptions, listening: socket.socket) -> None:
        self.options = options
        spec = trtllm_spec_of(options)
        self._log = ServedLog(options.served_log)
        self.adapters = Adapters(spec, options.native_fp8, options.load_ms / 1e3)
        stats = IterationStats(spec, options.iteration_stats)
        compute = ByLlama(spec, options.seed, False) if options.computes else ByContent(spec, False)
        cost = CostModel.from_file(options.cost_table or A100_TABLE, options.time_scale, options.max_lora_rank)
        faults = Faults(options)
        self._driver = TorchDriver(
            Engine(spec, cost), compute, faults, self._log, self.adapters, stats, options.slow_factor
        )
        serving = Serving(self._driver, self.adapters, options, self._die)
        routes = Routes(options, serving, self._driver, stats, self.adapters, self._leave)
        self._http = http_server(options, routes.app())
        self._socket = listening
        self._worker_died: str | None = None
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
    def died(self) -> str | None:
        """Why the engine has ended, None while it runs; no client is told."""
        return self._worker_died or self.engine.died

    @property
    def most_adapters(self) -> int:
        """The most adapters of one step so far."""
        return self._driver.most_adapters

    @property
    def served(self) -> list[Served]:
        """The endings so far, oldest first; the last 100,000 are kept."""
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
        """Wait until the server has ended because its engine died, and raise the cause."""
        await asyncio.wait([self._serving])
        if self._worker_died is not None:
            raise EngineDied(self._worker_died)
        self._driving.result()

    async def stop(self, grace: float | None = None) -> None:
        """Accept nothing new, let running requests continue for `grace` seconds, then end them.

        Raises an error that ended the driver, except EngineDied, which a test may have caused on purpose.
        """
        self._http.should_exit = True
        await asyncio.wait([self._serving], timeout=grace or 0)
        self._http.cut()
        if not self._driving.done():
            self._driver.end_all()
            self._driving.cancel()
        endings = await asyncio.gather(self._driving, self._serving, return_exceptions=True)
        self._log.close()
        for ending in endings:
            if isinstance(ending, Exception) and not isinstance(ending, EngineDied):
                raise ending

    def _leave(self) -> None:
        """Stop listening and end when the last client has gone, as a first SIGINT does."""
        self._http.should_exit = True

    def _die(self, text: str) -> None:
        """End at once, with the worker that an exception has ended."""
        self._worker_died = text
        self._http.cut()


async def serve_trtllm(options: TrtllmOptions) -> TrtllmServer:
    """Start an emulated trtllm-serve and return when it takes requests.

    Raises ValueError for options that contradict each other, OSError if a port is taken.
    """
    listening = bound_socket(options.host, options.http_port, "--http-port")
    try:
        server = TrtllmServer(options, listening)
    except BaseException:
        listening.close()
        raise
    await server.start()
    return server
