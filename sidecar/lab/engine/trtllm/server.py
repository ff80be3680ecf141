"""Start and stop an emulated trtllm-serve."""

from __future__ import annotations

import asyncio
import socket

from sidecar.lab.engine.engine import Engine
from sidecar.lab.engine.http.compute import ByContent, ByLlama
from sidecar.lab.engine.http.driver import EngineDied
from sidecar.lab.engine.http.server import http_server
from sidecar.lab.engine.kserve.faults import Faults
from sidecar.lab.engine.kserve.served import Served, ServedLog
from sidecar.lab.engine.listening import bound_socket
from sidecar.lab.engine.trtllm.adapters import Adapters
from sidecar.lab.engine.trtllm.app import Routes
from sidecar.lab.engine.trtllm.driver import TorchDriver
from sidecar.lab.engine.trtllm.options import TrtllmOptions, trtllm_spec_of
from sidecar.lab.engine.trtllm.serving import Serving
from sidecar.lab.engine.trtllm.stats import IterationStats
from sidecar.pace.cost import A100_TABLE, CostModel


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
        self._cut_connections()
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
        self._cut_connections()

    def _cut_connections(self) -> None:
        self._http.should_exit = self._http.force_exit = True
        # uvicorn would listen until it looks at the flags.
        for listener in self._http.servers:
            listener.close()
        for connection in list(self._http.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()


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
