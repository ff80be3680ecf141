"""Start and stop an emulated vLLM."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from pathlib import Path

from sidecar.lab.engine.engine import Engine
from sidecar.lab.engine.http.compute import ByContent, ByLlama
from sidecar.lab.engine.http.driver import EngineDied
from sidecar.lab.engine.http.server import http_server
from sidecar.lab.engine.kserve.faults import Faults
from sidecar.lab.engine.kserve.served import Served, ServedLog
from sidecar.lab.engine.listening import bound_socket
from sidecar.lab.engine.openai.adapters import Adapters
from sidecar.lab.engine.openai.app import Routes
from sidecar.lab.engine.openai.loop import VllmDriver
from sidecar.lab.engine.openai.metrics import Metrics
from sidecar.lab.engine.openai.options import VllmOptions, vllm_spec_of
from sidecar.lab.engine.openai.rust import RustAdapters
from sidecar.lab.engine.openai.serving import Serving
from sidecar.lab.engine.spec import EngineSpec
from sidecar.pace.cost import A100_TABLE, CostModel

WATCHDOG_S = 5.0
"""How often vLLM checks whether its engine has died without a client being told."""


class VllmServer:
    """A running emulated vLLM; made by `serve_vllm`. It ends by itself when its engine dies."""

    def __init__(self, options: VllmOptions, listening: socket.socket) -> None:
        self.options = options
        spec = vllm_spec_of(options)
        self._log = ServedLog(options.served_log)
        self._metrics = Metrics(options.names[0], spec, options.rust_frontend, options.enable_lora)
        self._driver = _driver_of(options, spec, self._log, self._metrics)
        serving = Serving(self._driver, options, _fingerprint(options.vllm_version, spec))
        self.adapters = serving.adapters = _adapters_of(options, spec, serving)
        routes = Routes(options, serving, self._driver, self._metrics, self._end)
        self._http = http_server(options, routes.app())
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
        """The endings so far, oldest first, including load calls; the last 100,000 are kept."""
        return list(self._log.last)

    async def start(self) -> None:
        """Start to take requests."""
        self._driving = asyncio.create_task(self._driver.run())
        self._serving = asyncio.create_task(self._http.serve(sockets=[self._socket]))
        self._watching = asyncio.create_task(self._watch())
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
        self._http.force_exit = True
        self._watching.cancel()
        if not self._driving.done():
            self._driver.end_all()
            self._driving.cancel()
        endings = await asyncio.gather(self._driving, self._serving, self._watching, return_exceptions=True)
        self._log.close()
        for ending in endings:
            if isinstance(ending, Exception) and not isinstance(ending, EngineDied):
                raise ending

    def _end(self) -> None:
        """Stop the server after a client was told that the engine is dead; the Rust front end lingers."""
        self._http.should_exit = not self.options.rust_frontend

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCHDOG_S)
            if self._driver.is_dead:
                self._http.should_exit = True


async def serve_vllm(options: VllmOptions) -> VllmServer:
    """Start an emulated vLLM and return when it takes requests.

    Raises ValueError for options that contradict each other, OSError if a port is taken.
    """
    listening = bound_socket(options.host, options.http_port, "--http-port")
    try:
        server = VllmServer(options, listening)
    except BaseException:
        listening.close()
        raise
    await server.start()
    return server


def _driver_of(options: VllmOptions, spec: EngineSpec, log: ServedLog, metrics: Metrics) -> VllmDriver:
    compute: ByContent | ByLlama
    if options.computes:
        compute = ByLlama(spec, options.seed, options.mixing_breaks_base)
    else:
        compute = ByContent(spec, options.mixing_breaks_base)
    cost = CostModel.from_file(options.cost_table or A100_TABLE, options.time_scale, options.max_lora_rank)
    return VllmDriver(Engine(spec, cost), compute, Faults(options), log, metrics, options.slow_factor)


def _adapters_of(options: VllmOptions, spec: EngineSpec, serving: Serving) -> Adapters:
    common = options.names, spec, options.fail_load, serving.put, options.load_ms / 1e3
    adapters: Adapters
    if options.rust_frontend:
        adapters = RustAdapters(*common, serving.remove, [Path(prefix) for prefix in options.allowed_prefix])
    else:
        adapters = Adapters(*common)
        adapters.keeps_in_place = options.is_older
    adapters.is_enabled = options.enable_lora
    if options.multimodal:
        text_only = () if options.is_older else adapters.prefixes
        adapters.prefixes = ("language_model.model.", "model.language_model.", *text_only)
    return adapters


def _fingerprint(version: str, spec: EngineSpec) -> str:
    return f"vllm-{version}-{hashlib.sha256(repr(spec).encode()).hexdigest()[:8]}"
