"""Start and stop an emulated server.

The engine's gauges on Triton's metrics port, read when they are scraped.

Families and labels are those of `triton_metrics.cc` and `custom_metrics_reporter.cc`. As in every version read, none
shows the LoRA caches.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from tritonclient.grpc import service_pb2_grpc

from sidecar.lab.engine.engine import Engine
from sidecar.lab.engine.kserve.adapters import adapter_fault
from sidecar.lab.engine.kserve.answers import Answering
from sidecar.lab.engine.kserve.compute import BaseOnly, Compute, DummyCompute, LlamaCompute
from sidecar.lab.engine.kserve.control import Control
from sidecar.lab.engine.kserve.driver import Driver
from sidecar.lab.engine.kserve.errors import Rejection
from sidecar.lab.engine.kserve.faults import Faults
from sidecar.lab.engine.kserve.inference import Answer
from sidecar.lab.engine.kserve.models import CORE, models_of
from sidecar.lab.engine.kserve.options import DATATYPE_OF_DTYPE, LLMAPI, Options, spec_of
from sidecar.lab.engine.kserve.outputs import response
from sidecar.lab.engine.kserve.served import Served, ServedLog
from sidecar.lab.engine.kserve.shared_memory import Regions
from sidecar.lab.engine.kserve.streams import ClientLeft, Stream, StreamBroken
from sidecar.lab.engine.kserve.work import Work
from sidecar.lab.engine.listening import bound_socket, listening_at
from sidecar.lab.engine.messages import Counters
from sidecar.lab.engine.spec import EngineSpec, engine_config_json
from sidecar.pace.cost import A100_TABLE, CostModel

_MODEL = (CORE, "1")


class EngineGauges(Collector):
    """The nv_trt_llm_* families of the engine that `written_by` returns.

    Their labels name the model but not its instance, so with several instances the last writer's values stand.
    """

    def __init__(self, written_by: Callable[[], Engine]) -> None:
        self._written_by = written_by

    def describe(self) -> Iterable[Metric]:
        """Return nothing: families are only known by collecting them, which needs no registration check."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the families with the engine's numbers of this moment."""
        engine = self._written_by()
        counters, spec = engine.counters, engine.spec
        yield _family("nv_trt_llm_request_metrics", "request_type", _requests(counters, spec.max_batch_size))
        yield _family(
            "nv_trt_llm_kv_cache_block_metrics",
            "kv_cache_block_type",
            _blocks(counters, spec.tokens_per_block),
        )
        yield _family("nv_trt_llm_runtime_memory_metrics", "memory_type", {"cpu": 0, "gpu": 0, "pinned": 0})
        yield _family("nv_trt_llm_inflight_batcher_metrics", "inflight_batcher_specific_metric", _batcher(counters))
        yield _family(
            "nv_trt_llm_general_metrics",
            "general_type",
            {"timestamp": int(time.time()), "iteration_counter": counters.iteration_counter},
        )


class MetricsServer:
    """An HTTP server in its own thread that serves the gauges; with None it has none."""

    def __init__(self, written_by: Callable[[], Engine] | None, host: str, port: int) -> None:
        registry = CollectorRegistry()
        if written_by is not None:
            registry.register(EngineGauges(written_by))
        self._server: Any
        self._server, self._thread = start_http_server(port, host, registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _family(name: str, label: str, numbers: dict[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, f"TRT LLM {label} statistics", labels=("model", "version", label))
    for value, number in numbers.items():
        family.add_metric((*_MODEL, value), number)
    return family


def _requests(counters: Counters, seats: int) -> dict[str, float]:
    return {
        "active": counters.active,
        "max": seats,
        "scheduled": counters.scheduled,
        "context": counters.context,
        # The backend reports active minus scheduled here, not the executor's queue.
        "waiting": counters.active - counters.scheduled,
    }


def _blocks(counters: Counters, tokens_per_block: int) -> dict[str, float]:
    return {
        "max": counters.kv_max_blocks,
        "free": counters.kv_free_blocks,
        "used": counters.kv_used_blocks,
        "tokens_per": tokens_per_block,
        "reused": 0,
        "fraction": counters.kv_used_blocks / counters.kv_max_blocks if counters.kv_max_blocks else 0.0,
    }


def _batcher(counters: Counters) -> dict[str, float]:
    return {
        "total_context_tokens": counters.context_tokens,
        "generation_requests": counters.generation,
        "micro_batch_id": 0,
        "paused_requests": counters.paused,
    }


MESSAGE_BYTES_MAX = 2**31 - 1
"""Triton's limit of one gRPC message, both ways."""
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # A port in use must be an error, not a second server behind the same address.
    ("grpc.so_reuseport", 0),
)
DECOUPLED_REFUSAL = "ModelInfer RPC doesn't support models with decoupled transaction policy"
_GRPC_ERRORS = ("triton_grpc_error", "true")


class Server:
    """A running emulated server; made by `serve`."""

    def __init__(
        self,
        options: Options,
        grpc_server: grpc.aio.Server,
        grpc_port: int,
        drivers: Sequence[Driver],
        log: ServedLog,
        metrics: MetricsServer | None,
    ) -> None:
        self.options = options
        self.grpc_address = f"{options.host}:{grpc_port}"
        self.metrics_address = None if metrics is None else f"{options.host}:{metrics.port}"
        self._grpc_server = grpc_server
        self._drivers = drivers
        self._log = log
        self._metrics = metrics
        self._driving = [asyncio.create_task(driver.run()) for driver in drivers]

    @property
    def engines(self) -> list[Engine]:
        """The engine model of each instance."""
        return [driver.engine for driver in self._drivers]

    @property
    def engine(self) -> Engine:
        """The engine model of the only instance."""
        (engine,) = self.engines
        return engine

    @property
    def served(self) -> list[Served]:
        """The endings so far, oldest first; the last 100,000 are kept."""
        return list(self._log.last)

    async def stop(self, grace: float | None = None) -> None:
        """Accept nothing new, let running requests continue for `grace` seconds, then end them.

        Raises the exception that ended a driver, if any.
        """
        await self._grpc_server.stop(grace)
        for driving in self._driving:
            driving.cancel()
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)
        endings = await asyncio.gather(*self._driving, return_exceptions=True)
        self._log.close()
        for ending in endings:
            if isinstance(ending, Exception):
                raise ending

    async def failed(self) -> None:
        """Wait until an error ends a driver, and raise it."""
        ended, _ = await asyncio.wait(self._driving, return_when=asyncio.FIRST_COMPLETED)
        for driving in ended:
            driving.result()


async def serve(options: Options) -> Server:
    """Start an emulated server and return when it takes requests.

    Raises ValueError for options that contradict each other, OSError if a port is taken.
    """
    spec = spec_of(options)
    if options.write_engine_config is not None:
        options.write_engine_config.write_text(json.dumps(engine_config_json(spec), indent=2) + "\n")
    log = ServedLog(options.served_log)
    faults = Faults(options)
    drivers = [driver_of(options, spec, log, faults, number) for number in range(options.instances)]
    instances = Instances(drivers)
    regions = Regions()
    answering = Answering(models_of(options), instances, regions, options)
    grpc_server = grpc.aio.server(options=_CHANNEL_OPTIONS)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(answering, regions), grpc_server)
    grpc_port = _add_port(grpc_server, options)
    metrics = None
    if options.metrics_port is not None:
        # The LLM-API model is a Python model that publishes nothing of its engine.
        written_by = None if options.protocol == LLMAPI else instances.last_writer
        with listening_at(options.host, options.metrics_port, "--metrics-port"):
            metrics = MetricsServer(written_by, options.host, options.metrics_port)
    await grpc_server.start()
    server = Server(options, grpc_server, grpc_port, drivers, log, metrics)
    if options.write_config is not None:
        import yaml  # here: the environment of a real Triton, whose models use this package, has none

        options.write_config.write_text(yaml.safe_dump({"backends": [_as_backend(server, spec)]}, sort_keys=False))
    return server


def _as_backend(server: Server, spec: EngineSpec) -> dict[str, Any]:
    """Return the entry of a sidecar's `backends` for a server, with what the server itself does not publish."""
    sizes: dict[str, Any] = {
        "host_pages": spec.host_pages,
        "device_pages": spec.device_pages,
        "rank_max": spec.max_lora_rank,
        "seats": spec.max_batch_size,
        "kv_tokens": spec.kv_blocks * spec.tokens_per_block,
    }
    if server.options.write_engine_config is not None:
        sizes["config"] = str(server.options.write_engine_config.absolute())
    metrics = {} if server.metrics_address is None else {"metrics": f"http://{server.metrics_address}/metrics"}
    return {"url": f"triton://{server.grpc_address}", **metrics, "engine": sizes}


def _add_port(grpc_server: grpc.aio.Server, options: Options) -> int:
    address, credentials = f"{options.host}:{options.grpc_port}", None
    if options.tls_certificate is not None and options.tls_key is not None:
        ca = None if options.tls_client_ca is None else options.tls_client_ca.read_bytes()
        pair = (options.tls_key.read_bytes(), options.tls_certificate.read_bytes())
        credentials = grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)
    bound_socket(options.host, options.grpc_port, "--grpc-port").close()  # gRPC would log a line of its own first
    with listening_at(options.host, options.grpc_port, "--grpc-port"):
        if credentials is None:
            return grpc_server.add_insecure_port(address)
        return grpc_server.add_secure_port(address, credentials)


def driver_of(options: Options, spec: EngineSpec, log: ServedLog, faults: Faults, number: int) -> Driver:
    """Return an instance's driver; `faults` are the whole server's."""
    compute: Compute = LlamaCompute(spec, options.seed) if options.computes else DummyCompute()
    # An engine that ignores adapters does not check the type of their weights.
    datatype = DATATYPE_OF_DTYPE[spec.dtype] if options.ignore_lora else options.weights_datatype

    def check(work: Work) -> str | None:
        return adapter_fault(work, spec, datatype)

    cost = CostModel.from_file(options.cost_table or A100_TABLE, options.time_scale, options.max_lora_rank)
    used = BaseOnly(compute) if options.ignore_lora else compute
    return Driver(Engine(spec, cost), used, faults, log, check, options.slow_factor, number)


class Instances:
    """Distributes the requests over the instances, one after another."""

    def __init__(self, drivers: Sequence[Driver]) -> None:
        self._drivers = drivers
        self._next = 0

    @property
    def engine(self) -> Engine:
        """The first instance's engine; all are built alike."""
        return self._drivers[0].engine

    @property
    def has_log_probs(self) -> bool:
        """True if requests may ask for log probabilities."""
        return self._drivers[0].has_log_probs

    def has_adapter(self, task_id: int) -> bool:
        """Return True if every instance has an adapter."""
        return all(driver.has_adapter(task_id) for driver in self._drivers)

    async def submit(self, work: Work) -> None:
        """Hand a request to an instance. Raises BackendError as `Driver.submit` does."""
        chosen = self._drivers[self._next]
        self._next = (self._next + 1) % len(self._drivers)
        await chosen.submit(work)

    def cancel(self, request_ids: Sequence[int]) -> None:
        """Ask the instances to end requests; unknown ones are ignored."""
        for driver in self._drivers:
            driver.cancel(request_ids)

    def last_writer(self) -> Engine:
        """Return the engine that last wrote its gauges, or the first one."""
        return max(self._drivers, key=lambda driver: driver.reported_ns).engine


class Service(Control):
    """GRPCInferenceService over one engine."""

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 — gRPC's name
        """Answer one request with one response; refused for decoupled models."""
        answers: list[Answer] = []

        async def emit(answer: Answer) -> None:
            answers.append(answer)

        try:
            model = self._answering.model(request.model_name, request.model_version)
            if model.decoupled:
                raise Rejection(DECOUPLED_REFUSAL, grpc.StatusCode.UNIMPLEMENTED)
            await self._answering.answer(request, emit)
        except Rejection as rejection:
            await context.abort(rejection.code, rejection.text)
        answer = answers[-1]
        if answer.error is not None:
            await context.abort(answer.code, answer.error)
        return response(model, request.id, answer.values or [])

    async def ModelStreamInfer(self, request_iterator: Any, context: Any) -> None:  # noqa: N802 — gRPC's name
        """Answer every request of a stream; errors are messages unless the client asks for real ones."""
        metadata = [tuple(item) for item in context.invocation_metadata() or ()]
        stream = Stream(self._answering, context.write, _GRPC_ERRORS in metadata)
        try:
            await stream.serve(request_iterator)
        except StreamBroken as broken:
            await context.abort(broken.code, broken.text)
        except ClientLeft:
            # The call is over already; returning ends its handler.
            return
