"""The backend kind `triton`: TensorRT-LLM's engine behind Triton, over KServe v2 gRPC.

A watcher task reaches the server, reads what it is, and looks at it once a second. A run whose wire breaks asks at
once whether the server still answers. An engine that hangs while its server stays live and ready is found by its pulse
(`pulse.py`), and is trusted again when it has answered a token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from typing import Any, TypeVar

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2_grpc

from sidecar.backends.api import Ticket, Weights
from sidecar.backends.credentials import open_channel
from sidecar.backends.engine_facts import from_model_config, merge, unknown_words
from sidecar.backends.gauges import Gauges, Scraper
from sidecar.backends.loads import LoaderProcess, LoadResult, Target
from sidecar.backends.probe import Probe, is_late, words
from sidecar.backends.pulse import Pulse
from sidecar.backends.regions import Regions
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
from sidecar.errors import Misused

logger = logging.getLogger(__name__)
T = TypeVar("T")

PROGRESS_S = 0.1
REACH_S = 0.2
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

    @property
    def look_s(self) -> float:
        """Seconds between two looks: several in the time after which silence is a fault."""
        return min(self.watch_interval_s, self.progress_timeout_s / 4)


class TritonBackend:
    """One Triton server."""

    def __init__(self, options: TritonOptions, loader: LoaderProcess) -> None:
        self.options = options
        self.id = options.id
        self.address = options.address
        self._loader = loader
        self._channel: grpc.aio.Channel = open_channel(options.address, options.tls)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._pool = StreamPool(self._channel)
        self._post: Callable[[Event], None] = lambda event: None
        self._up = False
        self._decoupled = True
        self._trouble = "not reached yet"
        self._runs: dict[tuple[int, int], Run] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loads: dict[int, asyncio.Task[None]] = {}
        self._sent: set[int] = set()
        self._progress: dict[int, int] = {}
        self._pulse = Pulse(options.progress_timeout_s, monotonic())
        self._scraper = Scraper(options.metrics_url, options.model) if options.metrics_url else None
        self._gauges: Gauges | None = None
        self._checking: asyncio.Task[bool] | None = None
        self._regions = Regions(options.id, self._stub)
        self._probe = Probe(options.id, options.address, options.model, self._stub)
        self._seen_at_s = monotonic()
        self._unknown = ""
        self._hung = False

    async def start(self, post: Callable[[Event], None]) -> None:
        self._post = post
        self._spawn(self._watch())
        self._spawn(self._report_progress())

    async def stop(self) -> None:
        self._up = False
        for run in list(self._runs.values()):
            run.cancel()
        tasks = [*self._tasks, *self._loads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._regions.close()
        self._pool.close()
        if self._scraper is not None:
            await self._scraper.close()
        await self._channel.close(None)

    @property
    def streams(self) -> bool:
        """Whether the model is decoupled; taken to be until the server says."""
        return self._decoupled

    def detail(self) -> str:
        if not self._up:
            return self._trouble
        if self._scraper is None:
            return f"reached; no metrics are configured{self._unknown}"
        gauges = "" if self._gauges is not None else f"; {self.options.metrics_url} has no metrics"
        return f"reached{gauges}{self._unknown}"

    # Runs.

    def run(self, effect: Dispatch, ticket: Ticket) -> None:
        if not self._up:
            return  # the loss that the core is about to hear of ends this run too
        run = Run(effect, ticket, self._post, self._heard, self._wire_broke)
        self._runs[effect.request, effect.attempt] = run
        self._quiet_ends()
        self._spawn(self._run(run))

    async def _run(self, run: Run) -> None:
        key = (run.effect.request, run.effect.attempt)
        try:
            await self._regions.restored()
            if run.cancelled:
                run.abandon()
            elif run.ticket.payload.unary:
                await run.unary(self._channel)
            else:
                await run.stream(self._pool)
        except asyncio.CancelledError:
            if not run.cancelled:
                raise
            run.abandon()
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
        if not self._up:
            weights.release()
            return
        task = asyncio.create_task(self._load(effect, weights))
        self._loads[effect.load] = task
        task.add_done_callback(lambda _: self._load_ended(effect.load, weights))

    def _load_ended(self, load: int, weights: Weights) -> None:
        del self._loads[load]
        self._sent.discard(load)
        weights.release()  # here: a task that is cancelled before it begins never gets to a finally

    def _load_sent(self, load: int) -> None:
        """From now on it is the engine that this load waits for: sending a large one takes its time."""
        self._quiet_ends()
        self._sent.add(load)

    async def _load(self, effect: Load, weights: Weights) -> None:
        target = Target(self.address, self.options.model, self._decoupled, self.options.tls)
        try:
            sent = partial(self._load_sent, effect.load)
            result = await self._loader.load(effect, weights, target, self.options.load_timeout_s, sent)
        except Exception as error:
            logger.exception("load %s on %s broke", effect.load, self.id)
            result = LoadResult(f"the sidecar failed: {error}", unanswered=True)
        if result.error is None:
            self._heard(0, 0)
            self._post(LoadDone(effect.load))
        elif not result.lost or not await self._wire_broke(result.error):
            self._post(LoadFailed(effect.load, result.fault, result.error))

    # Regions of clients' own shared memory.

    def register_regions(self) -> None:
        self._regions.restore()

    async def call(self, verb: str, request: Any) -> Any:
        """Pass a KServe verb on as it is. Raises grpc.RpcError with the server's own status."""
        reply = await getattr(self._stub, verb)(request, timeout=VERB_TIMEOUT_S)
        self._regions.note(verb, request)
        return reply

    # Watching.

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _heard(self, request: int, tokens: int) -> None:
        self._pulse.heard(monotonic())
        if tokens:
            self._progress[request] = self._progress.get(request, 0) + tokens

    def _quiet_ends(self) -> None:
        """Begin to count silence when the first thing is sent, not when the last one was heard."""
        if not self._waits_for_engine:
            self._pulse.heard(monotonic())

    @property
    def _waits_for_engine(self) -> bool:
        """Whether something is in flight that only the engine can move."""
        return bool(self._sent) or any(not run.waits_for_client for run in self._runs.values())

    async def _report_progress(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            held_up = [run.effect.request for run in self._runs.values() if run.waits_for_client]
            if self._up and (self._progress or held_up):
                progress, self._progress = self._progress, {}
                self._post(Progress(self.id, dict.fromkeys(held_up, 0) | progress))

    async def _watch(self) -> None:
        while True:
            try:
                if self._up:
                    await self._look()
                else:
                    await self._reach()
            except Misused as error:
                self._down(error.message)
            except grpc.RpcError as error:
                late_s = monotonic() - self._seen_at_s  # a busy server may be, a little
                if not self._up or not is_late(error) or late_s > self.options.progress_timeout_s:
                    self._down(f"{self.address} does not answer: {words(error)}")
            except Exception as error:
                logger.exception("looking at %s failed", self.id)
                self._down(f"the sidecar failed to look at it: {error}")
            await asyncio.sleep(self.options.look_s if self._up else min(REACH_S, self.options.look_s))

    def _down(self, trouble: str) -> None:
        """Note why the server is not up, once."""
        if self._up:
            self._lose(trouble)
        elif trouble != self._trouble:
            self._trouble = trouble
            logger.warning("%s is down: %s", self.id, trouble)

    async def _reach(self) -> None:
        """Read what the server is, and report it up."""
        await self._probe.ready()
        if self._hung:
            await self._probe.answer_once(self._decoupled)
        config = await self._probe.config()
        facts = merge(self.id, self.options.facts, from_model_config(config))
        self._decoupled = config.model_transaction_policy.decoupled
        self._seen_at_s = monotonic()
        self._pulse.begin(self._seen_at_s)
        self._gauges = None
        await self._measure()
        self._regions.restore()
        await self._regions.restored()
        facts = self._with_gauges(facts)
        self._unknown = unknown_words(facts)
        self._up, self._hung = True, False
        logger.info("%s is up: %s, %s", self.id, self.address, self.detail())
        self._post(BackendUp(self.id, facts))

    def _with_gauges(self, facts: EngineFacts) -> EngineFacts:
        if self._gauges is None:
            return facts
        seats, kv_tokens = facts.seats or self._gauges.seats, facts.kv_tokens or self._gauges.kv_tokens
        return replace(facts, seats=seats, kv_tokens=kv_tokens)

    async def _look(self) -> None:
        await self._probe.ready()
        self._seen_at_s = monotonic()
        restarted = await self._measure()
        if not self._up:
            return  # it was lost while it was being looked at
        now_s = monotonic()
        if restarted:
            self._lose("it has restarted: its iteration counter went back")
        elif self._waits_for_engine and self._pulse.is_still(now_s):
            self._hung = True
            self._lose(
                f"it answered nothing for {self._pulse.silent_s(now_s):.0f} s with {len(self._runs)} requests and "
                f"{len(self._sent)} loads in flight, and its iteration counter stood still or is not known"
            )

    async def _measure(self) -> bool:
        """Read the gauges; return whether they say that the engine has restarted."""
        gauges = None if self._scraper is None else await self._scraper.scrape()
        if gauges is None:
            return False
        restarted = self._pulse.counted(gauges.iterations, monotonic())
        sizes = replace(gauges, iterations=None)
        changed, self._gauges = self._gauges != sizes, sizes
        if self._up and changed and not restarted:
            facts = self.options.facts
            self._post(BackendMeasured(self.id, facts.seats or gauges.seats, facts.kv_tokens or gauges.kv_tokens))
        return restarted

    async def _wire_broke(self, text: str) -> bool:
        """Find out whether the server is gone, or only one stream; return whether the whole backend is lost."""
        if not self._up:
            return True
        if self._checking is None or self._checking.done():
            self._checking = self._spawn(self._still_there(text))
        return not await asyncio.shield(self._checking)

    async def _still_there(self, text: str) -> bool:
        try:
            await self._probe.ready()
        except (grpc.RpcError, Misused):
            if self._up:
                self._lose(text)
        return self._up

    def _lose(self, cause: str) -> None:
        """Report the backend lost and give up all that ran there; abandoned runs are cancelled where they can be."""
        logger.warning("%s is lost: %s", self.id, cause)
        self._up = False
        self._trouble = cause
        self._post(BackendLost(self.id, cause))
        for run in list(self._runs.values()):
            run.cancel()
        for task in list(self._loads.values()):
            task.cancel()
        self._pool.close()
        self._progress.clear()
