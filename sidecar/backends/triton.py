"""The backend kinds `triton` and `triton_llmapi`: TensorRT-LLM behind Triton, over KServe v2 gRPC.

A watcher task reaches the server, reads what it is, and looks at it once a second (`server.py`). A run whose wire
breaks asks at once whether the server still answers. An engine that hangs while its server stays live and ready is
found by its pulse. One that was lost is trusted again when it has answered a token. A server that unloads its model,
or puts another in its place, lets its requests end first, and so do we: meanwhile nothing new is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, TypeVar

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2_grpc

from sidecar.adapters.staging import AdaptersDir
from sidecar.backends import faults, wire
from sidecar.backends.api import Prompt, Ticket, Weights
from sidecar.backends.credentials import open_channel
from sidecar.backends.dialects import LlmApi
from sidecar.backends.loads import LoaderProcess, LoadResult, Target
from sidecar.backends.probe import answer_of, is_late, words
from sidecar.backends.regions import Regions
from sidecar.backends.server import CHANGED, Server, Sought
from sidecar.backends.streams import Run, StreamPool
from sidecar.backends.transport import NOT_SHARED, SharedMemory, Transport, Wanted
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
from sidecar.errors import Misused, SidecarError

logger = logging.getLogger(__name__)
T = TypeVar("T")

PROGRESS_S = 0.1
REACH_S = 0.2
VERB_TIMEOUT_S = 30.0
FORGET_AGAIN_S = 0.05
CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class TritonOptions:
    """How to reach and watch one server."""

    id: str
    address: str
    facts: EngineFacts = field(default_factory=EngineFacts)
    metrics_url: str | None = None
    model: str = "tensorrt_llm"
    text_model: str = "ensemble"
    tls: dict[str, str] | None = None
    transport: Wanted = "auto"
    memory: SharedMemory = NOT_SHARED
    adapters_dir: AdaptersDir | None = None
    watch_interval_s: float = 1.0
    progress_timeout_s: float = 30.0
    load_timeout_s: float = 120.0

    @property
    def sought(self) -> Sought:
        """What the watching needs of it."""
        return Sought(
            self.id,
            self.address,
            self.model,
            self.facts,
            self.metrics_url,
            self.adapters_dir,
            self.progress_timeout_s,
        )

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
        self._trouble = "not reached yet"
        self._closing = ""
        self._runs: dict[tuple[int, int], Run] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loads: dict[int, asyncio.Task[None]] = {}
        self._sent: set[int] = set()
        self._progress: dict[int, int] = {}
        self._measured: BackendMeasured | None = None
        self._checking: asyncio.Task[None] | None = None
        self._regions = Regions(options.id, self._stub)
        self._transport = Transport(options.id, options.transport, options.memory, self._stub)
        self._server = Server(options.sought, self._stub, self._transport)

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
        await self._leave_shared_memory()
        self._pool.close()
        await self._server.close()
        await self._channel.close(None)

    async def _leave_shared_memory(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._transport.close()
        except (grpc.RpcError, TimeoutError):
            logger.info("%s did not let go of our regions; whoever reaches it next clears them away", self.id)

    @property
    def streams(self) -> bool:
        """Whether the model is decoupled; taken to be until the server says."""
        return self._server.decoupled

    def detail(self) -> str:
        if not self._up:
            return self._trouble
        return f"{self._closing}; {len(self._runs)} still run" if self._closing else self._server.detail()

    # Runs.

    def run(self, effect: Dispatch, ticket: Ticket, weights: Weights | None = None) -> None:
        if not self._takes:
            _release(weights)
            return  # the loss that the core is about to hear of ends this run too
        run = Run(
            effect, ticket, self._post, self._heard, self._wire_broke, self._server.dialect, self._model_of(ticket)
        )
        self._runs[effect.request, effect.attempt] = run
        self._quiet_ends()
        task = self._spawn(self._run(run, weights))
        task.add_done_callback(lambda _: _release(weights))

    async def _run(self, run: Run, weights: Weights | None) -> None:
        key = (run.effect.request, run.effect.attempt)
        try:
            await self._regions.restored()
            if weights is not None:
                run.attached = await self._attached(run, weights)
            if run.cancelled:
                run.abandon()
            elif not self._takes or run.refused():
                return
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
            self._close_if_idle()

    def _model_of(self, ticket: Ticket) -> str:
        """Return the model that answers a request of ours; "" for a client's own, which names it."""
        prompt = ticket.payload.prompt
        takes_text = prompt is Prompt.TEXT and not isinstance(self._server.dialect, LlmApi)
        return "" if prompt is None else self.options.text_model if takes_text else self.options.model

    async def _attached(self, run: Run, weights: Weights) -> bytes:
        """Return what names a run's weights; nothing where the server would not have them by reference after all."""
        region = await self._transport.refer(weights)
        if region is None:
            return b""
        raw = run.ticket.payload.raw
        return wire.attached(weights.shape, weights.dtype, weights.config, region, weights.size_bytes, raw)

    def cancel(self, request: int, attempt: int) -> None:
        run = self._runs.get((request, attempt))
        if run is not None:
            run.cancel()

    # Loads.

    def load(self, effect: Load, weights: Weights) -> None:
        if not self._takes:
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
        try:
            if isinstance(self._server.dialect, LlmApi):
                result = await self._load_files(self._server.dialect, effect, weights)
            else:
                result = await self._load_packed(effect, weights)
        except Misused as refused:
            result = LoadResult(refused.message)
        except Exception as error:
            logger.exception("load %s on %s broke", effect.load, self.id)
            result = LoadResult(f"the sidecar failed: {error}", unanswered=True)
        if result.error is None:
            self._heard(0, 0)
            self._post(LoadDone(effect.load))
        elif not await self._explained(result):
            self._post(LoadFailed(effect.load, result.fault, result.error))

    async def _explained(self, result: LoadResult) -> bool:
        """Whether a load failed because the server is gone, or is another than it was: that ends all its loads."""
        assert result.error is not None
        if result.fault is Fault.LOST:
            return await self._wire_broke(result.error)
        if result.fault is Fault.REJECTED and self._takes and await self._has_changed():
            self._close(CHANGED)
        return not self._takes

    async def _has_changed(self) -> bool:
        try:
            return await self._server.changed()
        except (grpc.RpcError, Misused):
            return False  # the watcher judges that

    async def _load_packed(self, effect: Load, weights: Weights) -> LoadResult:
        """Send a blob, or name the region that it is in; once more if the server has forgotten the region."""
        target = Target(self.address, self.options.model, self._server.decoupled, self.options.tls)
        sent = partial(self._load_sent, effect.load)
        region = await self._transport.refer(weights)
        result = await self._loader.load(effect, weights, target, self.options.load_timeout_s, sent, region)
        if region is not None and result.fault is Fault.UNKNOWN_REGION:
            self._transport.doubt()
            region = await self._transport.refer(weights)
            result = await self._loader.load(effect, weights, target, self.options.load_timeout_s, sent, region)
        return result

    async def _load_files(self, dialect: LlmApi, effect: Load, weights: Weights) -> LoadResult:
        """Have the engine answer a token with an adapter whose files it can read."""
        try:
            await weights.ready()
        except SidecarError as refused:
            return LoadResult(refused.message, unanswered=refused.reason.row.retryable)
        self._load_sent(effect.load)
        request = dialect.load(self.options.model, effect)
        try:
            error = await answer_of(self._stub, request, self._server.decoupled, self.options.load_timeout_s)
        except grpc.aio.AioRpcError as failed:
            text = failed.details() or failed.code().name
            if is_late(failed):
                return LoadResult(
                    f"the engine did not take the adapter within {self.options.load_timeout_s:g} s", unanswered=True
                )
            return LoadResult(text, lost=wire.is_lost(failed.code(), text))
        return LoadResult(error)

    # Shared memory: the clients' own regions, and the store's.

    def register_regions(self) -> None:
        self._transport.doubt()
        self._regions.restore()

    async def forget(self, region: str) -> None:
        while self._up:
            try:
                await self._transport.forget(region)
                return
            except grpc.RpcError as error:
                logger.info("%s does not let go of %s yet: %s", self.id, region, words(error))
            await asyncio.sleep(FORGET_AGAIN_S)
        self._transport.lost(region)

    async def call(self, verb: str, request: Any) -> Any:
        """Pass a KServe verb on as it is. Raises grpc.RpcError with the server's own status."""
        reply = await getattr(self._stub, verb)(request, timeout=VERB_TIMEOUT_S)
        self._regions.note(verb, request)
        return reply

    # Watching.

    @property
    def _takes(self) -> bool:
        """Whether anything is sent. What the core has sent meanwhile ends with the loss that it is about to hear of."""
        return self._up and not self._closing

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _heard(self, request: int, tokens: int) -> None:
        self._server.pulse.heard(monotonic())
        if tokens:
            self._progress[request] = self._progress.get(request, 0) + tokens

    def _quiet_ends(self) -> None:
        """Begin to count silence when the first thing is sent, not when the last one was heard."""
        if not self._waits_for_engine:
            self._server.pulse.heard(monotonic())

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
                late_s = monotonic() - self._server.seen_at_s  # a busy server may be, a little
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
        facts = await self._server.reach()
        self._regions.restore()
        await self._regions.restored()
        self._up, self._measured = True, None
        logger.info("%s is up: %s, %s", self.id, self.address, self.detail())
        self._post(BackendUp(self.id, facts))

    async def _look(self) -> None:
        replaced = await self._server.look()
        if not self._up:
            return  # it was lost while it was being looked at
        if self._waits_for_engine and await self._server.hangs():
            self._hangs()
        elif replaced is not None:
            self._close(replaced)
        else:
            self._report_measures()

    def _hangs(self) -> None:
        if self._up:
            self._lose(
                f"it answered nothing for {self._server.pulse.silent_s(monotonic()):.0f} s with {len(self._runs)} "
                f"requests and {len(self._sent)} loads in flight, and "
                f"{'made no step' if self._server.pulse.is_counted else 'no probe'}"
            )

    def _close(self, cause: str) -> None:
        """Send nothing more, and report the backend lost when what runs has ended: the server lets it."""
        if self._takes:
            logger.warning("%s takes nothing new: %s", self.id, cause)
            self._closing = cause
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._up and self._closing and not self._runs:
            self._lose(self._closing)

    def _report_measures(self) -> None:
        """Tell the core how much the engine takes and how full it is, when that is not what it was told last."""
        gauges, facts = self._server.gauges, self.options.facts
        if gauges is None:
            return
        measured = BackendMeasured(
            self.id, facts.seats or gauges.seats, facts.kv_tokens or gauges.kv_tokens, gauges.kv_used
        )
        if measured != self._measured:
            self._measured = measured
            self._post(measured)

    async def _wire_broke(self, text: str, begun: bool = False) -> bool:
        """Find out whether the server is gone, or only one stream; return whether the backend's loss ends it too.

        An answer that has begun is not kept waiting until the others have ended.
        """
        if self._takes:
            if self._checking is None or self._checking.done():
                self._checking = self._spawn(self._look_after(text))
            await asyncio.shield(self._checking)
        return not self._up or (bool(self._closing) and not begun)

    async def _look_after(self, text: str) -> None:
        """Look at a server of which there is bad news: a broken wire, or words that its engine may be gone."""
        try:
            await self._server.ready()
            if await self._server.changed():
                self._close(CHANGED)
                return
            is_there = faults.classify(text) is not Fault.LOST or await self._server.answers()
        except Misused as unready:
            self._close(unready.message)
            return
        except grpc.RpcError:
            is_there = False
        if self._up and not is_there:
            self._lose(text)

    def _lose(self, cause: str) -> None:
        """Report the backend lost and give up all that ran there; abandoned runs are cancelled where they can be."""
        logger.warning("%s is lost: %s", self.id, cause)
        self._up, self._closing = False, ""
        self._server.distrust()
        self._trouble = cause
        self._post(BackendLost(self.id, cause))
        for run in list(self._runs.values()):
            run.cancel()
        for task in list(self._loads.values()):
            task.cancel()
        self._pool.close()
        self._progress.clear()


def _release(weights: Weights | None) -> None:
    if weights is not None:
        weights.release()
