"""Start and stop an emulated trtllm-serve.

The routes of an emulated trtllm-serve, and one of the emulator's own: `GET /emulator`.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sidecar.lab.engine.http.driver import EngineDied
from sidecar.lab.engine.http.server import EngineServer, application, as_response, engine_of, http_server, started
from sidecar.lab.engine.kserve.faults import Faults
from sidecar.lab.engine.kserve.served import ServedLog
from sidecar.lab.engine.trtllm.adapters import Adapters
from sidecar.lab.engine.trtllm.driver import TorchDriver
from sidecar.lab.engine.trtllm.errors import ServerFault
from sidecar.lab.engine.trtllm.options import VERSIONS, TrtllmOptions, trtllm_spec_of
from sidecar.lab.engine.trtllm.serving import Serving
from sidecar.lab.engine.trtllm.stats import IterationStats

UNAVAILABLE = "LLM is unavailable. Please check the server logs for more details."


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
        return application(posts, gets, {ServerFault: _fault})

    async def _models(self, request: Request) -> Response:
        card = {"id": self._options.model_name, "object": "model", "created": int(time.time())}
        return as_response({"object": "list", "data": [card | {"owned_by": "tensorrt_llm"}]})

    async def _health(self, request: Request) -> Response:
        if not self._driver.is_dead or not self._options.is_main:
            return Response()
        self._leave()
        return Response(UNAVAILABLE, 503)

    async def _health_generate(self, request: Request) -> Response:
        status, text = await self._serving.try_base()
        return Response(text, status)

    async def _version(self, request: Request) -> Response:
        return as_response({"version": VERSIONS[self._options.era]})

    async def _server_info(self, request: Request) -> Response:
        return as_response({"disaggregated_params": None, "max_batch_size": self._options.seats})

    async def _metrics(self, request: Request) -> Response:
        # With the Prometheus collector main drains the statistics itself, so there is nothing to wait for.
        waits = not (self._options.is_main and self._options.perf_metrics)
        return as_response(await (self._stats.drain() if waits else self._stats.drain(0)))

    async def _kv_cache_events(self, request: Request) -> Response:
        return as_response([])

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
        return as_response(shown)


async def _fault(request: Request, error: Exception) -> Response:
    return PlainTextResponse("Internal Server Error", 500)


class TrtllmServer(EngineServer):
    """A running emulated trtllm-serve; made by `serve_trtllm`. Some ends of its engine end it too."""

    _driver: TorchDriver

    def __init__(self, options: TrtllmOptions, listening: socket.socket) -> None:
        super().__init__(options, listening)
        spec = trtllm_spec_of(options)
        self._log = ServedLog(options.served_log)
        self.adapters = Adapters(spec, options.native_fp8, options.load_ms / 1e3)
        stats = IterationStats(spec, options.iteration_stats)
        engine, compute = engine_of(options, spec)
        self._driver = TorchDriver(
            engine, compute, Faults(options), self._log, self.adapters, stats, options.slow_factor
        )
        serving = Serving(self._driver, self.adapters, options, self._die)
        routes = Routes(options, serving, self._driver, stats, self.adapters, self._leave)
        self._http = http_server(options, routes.app())
        self._worker_died: str | None = None

    @property
    def died(self) -> str | None:
        """Why the engine has ended, None while it runs; no client is told."""
        return self._worker_died or self.engine.died

    @property
    def most_adapters(self) -> int:
        """The most adapters of one step so far."""
        return self._driver.most_adapters

    async def failed(self) -> None:
        await asyncio.wait([self._serving])
        if self._worker_died is not None:
            raise EngineDied(self._worker_died)
        await super().failed()

    def _die(self, text: str) -> None:
        """End at once, with the worker that an exception has ended."""
        self._worker_died = text
        self._http.cut()


async def serve_trtllm(options: TrtllmOptions) -> TrtllmServer:
    """Start an emulated trtllm-serve and return when it takes requests. Raises as `started`."""
    return await started(TrtllmServer, options)
