"""The backend kind `triton`: TensorRT-LLM's engine behind Triton, over KServe v2 gRPC.

A watcher task reaches the server, reads what it is, and looks at it once a second. A run whose wire breaks asks at
once whether the server still answers. An engine that hangs while its server stays live and ready is found by what it
does: something is in flight, no response came for `progress_timeout_s`, and its iteration counter stood still.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidecar.backends import faults, wire
from sidecar.backends.api import Ticket, Weights
from sidecar.backends.credentials import channel_credentials
from sidecar.backends.engine_facts import from_model_config, merge
from sidecar.backends.gauges import Gauges, scrape
from sidecar.backends.loads import LoaderProcess, Target
from sidecar.backends.streams import Run, StreamPool
from sidecar.core.effects import Dispatch, Load
from sidecar.core.events import (
    BackendLost,
    BackendMeasured,
    BackendUp,
    Event,
    LoadDone,
    LoadFailed,
    Progress,
    RunFailed,
)
from sidecar.core.facts import EngineFacts
from sidecar.core.words import Fault
from sidecar.errors import Misused, Reason

logger = logging.getLogger(__name__)

PROGRESS_S = 0.1
PROBE_TIMEOUT_S = 2.0
VERB_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class TritonOptions:
    """How to reach and watch one server."""

    id: str
    address: str
    facts: EngineFacts = field(default_factory=EngineFacts)
    metrics_url: str | None = None
    model: str = "tensorrt_llm"
    tls: dict[str, str] | None = None
    watch_interval_s: float = 1.0
    progress_timeout_s: float = 30.0
    load_timeout_s: float = 120.0


class TritonBackend:
    """One Triton server."""

    def __init__(self, options: TritonOptions, loader: LoaderProcess) -> None:
        self.options = options
        self.id = options.id
        self.address = options.address
        self._loader = loader
        self._channel: grpc.aio.Channel = open_channel(options)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._pool = StreamPool(self._channel)
        self._post: Callable[[Event], None] = lambda event: None
        self._up = False
        self._decoupled = True
        self._detail = "not reached yet"
        self._runs: dict[tuple[int, int], Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loads: dict[int, asyncio.Task[None]] = {}
        self._progress: dict[int, int] = {}
        self._heard_at = monotonic()
        self._iterations: int | None = None
        self._gauges: Gauges | None = None
        self._checking: asyncio.Task[bool] | None = None
        self._regions: dict[str, Any] = {}
        self._regions_task: asyncio.Task[None] | None = None
        self._stuck = False

    async def start(self, post: Callable[[Event], None]) -> None:
        self._post = post
        self._spawn(self._watch())
        self._spawn(self._report_progress())

    async def stop(self) -> None:
        for run in list(self._runs.values()):
            run.cancel()
        tasks = [*self._tasks, *self._loads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._pool.close()
        await self._channel.close(None)

    def detail(self) -> str:
        return self._detail

    # Runs.

    def run(self, effect: Dispatch, ticket: Ticket) -> None:
        run = Run(effect, ticket, self._post, self._heard, self._wire_broke)
        self._runs[effect.request, effect.attempt] = run
        self._quiet_ends()
        self._spawn(self._run(run))

    async def _run(self, run: Run) -> None:
        key = (run.effect.request, run.effect.attempt)
        try:
            if self._regions_task is not None:
                await self._regions_task
            if run.cancelled:
                run.abandon()
            elif run.ticket.payload.unary:
                await run.unary(self._channel)
            else:
                await run.stream(self._pool)
        except Exception as error:
            logger.exception("run %s on %s broke", run.engine_id, self.id)
            self._post(RunFailed(*key, Fault.REJECTED, f"the sidecar failed: {error}", run.tokens))
        finally:
            self._runs.pop(key, None)
            self._progress.pop(run.effect.request, None)

    def cancel(self, request: int, attempt: int) -> None:
        run = self._runs.get((request, attempt))
        if run is not None:
            run.cancel()

    # Loads.

    def load(self, effect: Load, weights: Weights) -> None:
        self._quiet_ends()
        task = asyncio.create_task(self._load(effect, weights))
        self._loads[effect.load] = task
        task.add_done_callback(lambda _: self._loads.pop(effect.load, None))

    async def _load(self, effect: Load, weights: Weights) -> None:
        target = Target(self.address, self.options.model, self._decoupled, self.options.tls)
        try:
            result = await self._loader.load(effect, weights, target, self.options.load_timeout_s)
        finally:
            weights.release()
        self._heard(0, 0)
        if result.error is None:
            self._post(LoadDone(effect.load))
        elif not result.lost:
            self._post(LoadFailed(effect.load, faults.classify(result.error), result.error))
        elif not await self._wire_broke(result.error):
            self._post(LoadFailed(effect.load, Fault.LOST, result.error))

    # Regions of clients' own shared memory.

    def _note_region(self, verb: str, request: Any) -> None:
        """Keep clients' registrations, so that a server that restarted can be given them again."""
        if verb == "SystemSharedMemoryRegister":
            self._regions[request.name] = request
        elif verb == "SystemSharedMemoryUnregister" and request.name:
            self._regions.pop(request.name, None)
        elif verb == "SystemSharedMemoryUnregister":
            self._regions.clear()

    def register_regions(self) -> None:
        self._regions_task = asyncio.create_task(self._register_regions())

    async def _register_regions(self) -> None:
        for name, request in list(self._regions.items()):
            try:
                await self._stub.SystemSharedMemoryRegister(request, timeout=PROBE_TIMEOUT_S)
            except grpc.RpcError as error:
                logger.warning("%s did not take the shared-memory region %s again: %s", self.id, name, error)
        self._regions_task = None

    async def call(self, verb: str, request: Any) -> Any:
        """Pass a KServe verb on as it is. Raises grpc.RpcError with the server's own status."""
        self._note_region(verb, request)
        return await getattr(self._stub, verb)(request, timeout=VERB_TIMEOUT_S)

    # Watching.

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _heard(self, request: int, tokens: int) -> None:
        self._heard_at = monotonic()
        if tokens:
            self._progress[request] = self._progress.get(request, 0) + tokens

    def _quiet_ends(self) -> None:
        """Begin to count silence when the first thing is sent, not when the last one was heard."""
        if not self._runs and not self._loads:
            self._heard_at = monotonic()

    async def _report_progress(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            if self._progress and self._up:
                progress, self._progress = self._progress, {}
                self._post(Progress(self.id, progress))

    async def _watch(self) -> None:
        while True:
            try:
                if self._up:
                    await self._look()
                else:
                    await self._reach()
            except Misused as error:
                self._detail = error.message
                logger.error("%s", error.message)
            except grpc.RpcError as error:
                self._unreachable(_words(error))
            await asyncio.sleep(self.options.watch_interval_s if self._up else min(0.2, self.options.watch_interval_s))

    def _unreachable(self, text: str) -> None:
        if self._up:
            self._lose(text)
        else:
            self._detail = f"{self.address} does not answer: {text}"

    async def _reach(self) -> None:
        """Read what the server is, and report it up."""
        await self._ready()
        if self._stuck:
            await self._answer_once()
        config = (
            await self._stub.ModelConfig(
                service_pb2.ModelConfigRequest(name=self.options.model), timeout=PROBE_TIMEOUT_S
            )
        ).config
        facts = merge(self.id, self.options.facts, from_model_config(config))
        self._decoupled = config.model_transaction_policy.decoupled
        self._iterations = None
        await self._measure()
        if self._gauges is not None:
            facts = replace(
                facts,
                seats=self.options.facts.seats or self._gauges.seats or facts.seats,
                kv_tokens=self.options.facts.kv_tokens or self._gauges.kv_tokens,
            )
        if self._regions:
            await self._register_regions()
        self._up, self._stuck = True, False
        self._detail = "reached" if self._gauges is not None else "reached; its metrics are not"
        self._heard_at = monotonic()
        self._post(BackendUp(self.id, facts))

    async def _ready(self) -> None:
        reply = await self._stub.ModelReady(
            service_pb2.ModelReadyRequest(name=self.options.model), timeout=PROBE_TIMEOUT_S
        )
        if not reply.ready:
            raise Misused(
                Reason.BACKEND_UNREACHABLE,
                f"{self.id}: {self.address} answers, but its model {self.options.model} is not ready",
            )

    async def _answer_once(self) -> None:
        """Have an engine that hung answer one token before it is trusted again."""
        request = wire.load_head(self.options.model, "lora-sidecar-probe")
        if not self._decoupled:
            await self._stub.ModelInfer(request, timeout=PROBE_TIMEOUT_S)
            return
        async for response in self._stub.ModelStreamInfer(iter([request]), timeout=PROBE_TIMEOUT_S):
            if response.error_message or wire.is_final(response.infer_response.parameters):
                return

    async def _look(self) -> None:
        await self._ready()
        moved = await self._measure()
        silent_s = monotonic() - self._heard_at
        if (self._runs or self._loads) and silent_s > self.options.progress_timeout_s and not moved:
            self._stuck = True
            self._lose(
                f"it answered nothing for {silent_s:.0f} s with {len(self._runs)} requests in flight and its "
                "iteration counter stood still"
            )

    async def _measure(self) -> bool:
        """Read the gauges; say whether the engine has iterated since the last look."""
        if self.options.metrics_url is None:
            return False
        gauges = await scrape(self.options.metrics_url)
        if gauges is None:
            return False
        before, self._iterations = self._iterations, gauges.iterations
        if self._up and before is not None and gauges.iterations is not None and gauges.iterations < before:
            self._lose("it has restarted: its iteration counter went back")
            return True
        changed, self._gauges = self._gauges != replace(gauges, iterations=None), replace(gauges, iterations=None)
        if self._up and changed:
            facts = self.options.facts
            self._post(BackendMeasured(self.id, facts.seats or gauges.seats, facts.kv_tokens or gauges.kv_tokens))
        return before is None or gauges.iterations != before

    async def _wire_broke(self, text: str) -> bool:
        """Find out whether the server is gone, or only one stream; return whether the whole backend is lost."""
        if not self._up:
            return True
        if self._checking is None:
            self._checking = asyncio.create_task(self._still_there(text))
            self._checking.add_done_callback(self._checked)
        return not await asyncio.shield(self._checking)

    def _checked(self, task: asyncio.Task[bool]) -> None:
        self._checking = None

    async def _still_there(self, text: str) -> bool:
        try:
            await self._ready()
        except (grpc.RpcError, Misused):
            if self._up:
                self._lose(text)
            return False
        return True

    def _lose(self, cause: str) -> None:
        """Report the backend lost and give up all that ran there; abandoned runs are cancelled where they can be."""
        logger.warning("%s is lost: %s", self.id, cause)
        self._up = False
        self._detail = cause
        self._post(BackendLost(self.id, cause))
        for run in list(self._runs.values()):
            run.cancel()
        for task in list(self._loads.values()):
            task.cancel()
        self._pool.close()
        self._progress.clear()


def _words(error: grpc.RpcError) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)


def open_channel(options: TritonOptions) -> grpc.aio.Channel:
    """Return a channel to the server, with TLS if files are named."""
    if options.tls is None:
        return grpc.aio.insecure_channel(options.address, options=wire.CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(options.address, channel_credentials(options.tls), options=wire.CHANNEL_OPTIONS)
