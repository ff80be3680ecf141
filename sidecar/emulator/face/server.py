"""Starting and stopping an emulated server."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress

import grpc
from tritonclient.grpc import service_pb2_grpc

from sidecar.emulator.cost import A100_TABLE, CostModel
from sidecar.emulator.engine import Engine
from sidecar.emulator.face.adapters import adapter_fault
from sidecar.emulator.face.answers import Answering
from sidecar.emulator.face.compute import Compute, DummyCompute, LlamaCompute
from sidecar.emulator.face.driver import Driver
from sidecar.emulator.face.faults import Faults
from sidecar.emulator.face.metrics import MetricsServer
from sidecar.emulator.face.models import models_of
from sidecar.emulator.face.options import Options, spec_of
from sidecar.emulator.face.served import Served, ServedLog
from sidecar.emulator.face.service import Service
from sidecar.emulator.face.shared_memory import Regions
from sidecar.emulator.face.work import Work
from sidecar.emulator.spec import EngineSpec, engine_config_json

MESSAGE_BYTES_MAX = 2**31 - 1
"""Triton's limit of one gRPC message, both ways."""
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # A port in use must be an error, not a second server behind the same address.
    ("grpc.so_reuseport", 0),
)


class Server:
    """A running emulated server; made by `serve`."""

    def __init__(
        self,
        options: Options,
        grpc_server: grpc.aio.Server,
        grpc_port: int,
        driver: Driver,
        log: ServedLog,
        metrics: MetricsServer | None,
    ) -> None:
        self.options = options
        self.grpc_address = f"{options.host}:{grpc_port}"
        self.metrics_address = None if metrics is None else f"{options.host}:{metrics.port}"
        self._grpc_server = grpc_server
        self._driver = driver
        self._log = log
        self._metrics = metrics
        self._driving = asyncio.create_task(driver.run())

    @property
    def engine(self) -> Engine:
        """The engine model, to look at."""
        return self._driver.engine

    @property
    def served(self) -> list[Served]:
        """The endings so far, oldest first; the last 100,000 are kept."""
        return list(self._log.last)

    async def stop(self, grace: float | None = None) -> None:
        """Accept nothing new, give what runs `grace` seconds, then end it. Raises what ended the driver, if
        anything.
        """
        await self._grpc_server.stop(grace)
        self._driving.cancel()
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)
        with suppress(asyncio.CancelledError):
            await self._driving
        self._log.close()

    async def failed(self) -> None:
        """Wait until the driver ends by itself, which only an error makes it do, and raise that."""
        await asyncio.shield(self._driving)


async def serve(options: Options) -> Server:
    """Start an emulated server and return when it takes requests.

    Raises ValueError for options that contradict each other, OSError or RuntimeError when a port is taken.
    """
    spec = spec_of(options)
    if options.write_engine_config is not None:
        options.write_engine_config.write_text(json.dumps(engine_config_json(spec), indent=2) + "\n")
    log = ServedLog(options.served_log)
    driver = _driver(options, spec, log)
    regions = Regions()
    answering = Answering(models_of(options), driver, regions, options)
    grpc_server = grpc.aio.server(options=_CHANNEL_OPTIONS)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(answering, regions), grpc_server)
    grpc_port = _add_port(grpc_server, options)
    metrics = None
    if options.metrics_port is not None:
        metrics = MetricsServer(driver.engine, options.host, options.metrics_port)
    await grpc_server.start()
    return Server(options, grpc_server, grpc_port, driver, log, metrics)


def _add_port(grpc_server: grpc.aio.Server, options: Options) -> int:
    address = f"{options.host}:{options.grpc_port}"
    if options.tls_certificate is None or options.tls_key is None:
        return grpc_server.add_insecure_port(address)
    ca = None if options.tls_client_ca is None else options.tls_client_ca.read_bytes()
    credentials = grpc.ssl_server_credentials(
        [(options.tls_key.read_bytes(), options.tls_certificate.read_bytes())], ca, require_client_auth=ca is not None
    )
    return grpc_server.add_secure_port(address, credentials)


def _driver(options: Options, spec: EngineSpec, log: ServedLog) -> Driver:
    compute: Compute = LlamaCompute(spec, options.seed) if options.computes else DummyCompute()

    def check(work: Work) -> str | None:
        return adapter_fault(work, spec, options.weights_datatype)

    cost = CostModel.from_file(options.cost_table or A100_TABLE, options.time_scale, options.max_lora_rank)
    engine = Engine(spec, cost)
    return Driver(engine, compute, Faults(options), log, check, options.slow_factor)
