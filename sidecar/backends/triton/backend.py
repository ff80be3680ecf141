"""The backend of Triton servers, over KServe v2 gRPC.

A watcher task reaches the server, reads what it is, and looks at it once a second (`server.py`). A run whose connection
breaks has it looked at once. The pulse finds an engine that hangs while its server stays live and ready. A backend that
was lost is trusted again once it has answered a token. A server that unloads or replaces its model lets its requests
finish, and so does the backend: it sends nothing new meanwhile.

Remember the shared-memory regions that clients registered at a server, to register them again.

A restarted server has forgotten them, and its clients do not notice the restart: the sidecar is between.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2_grpc

from sidecar.backends import faults, wire
from sidecar.backends.api import LoadResult, Prompt, Ticket, Weights, Whole
from sidecar.backends.credentials import open_channel
from sidecar.backends.endpoint import Endpoint
from sidecar.backends.kind import Wiring
from sidecar.backends.triton.counting import Counter
from sidecar.backends.triton.dialects import LlmApi
from sidecar.backends.triton.entry import TritonEntry
from sidecar.backends.triton.loads import Target
from sidecar.backends.triton.probe import answer_of, is_late
from sidecar.backends.triton.server import CHANGED, Server
from sidecar.backends.triton.streams import Run, StreamPool
from sidecar.backends.triton.transport import Transport
from sidecar.core.effects import Dispatch, Load
from sidecar.core.enums import Fault
from sidecar.core.events import BackendMeasured
from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused
from sidecar.tasks import ended

REGISTER_TIMEOUT_S = 2.0


class Regions:
    """The clients' regions at one server. `stub` is its KServe stub."""

    def __init__(self, backend: str, stub: Any) -> None:
        self._backend = backend
        self._stub = stub
        self._requests: dict[str, Any] = {}
        self._restoring: asyncio.Task[None] | None = None

    def note(self, verb: str, request: Any) -> None:
        """Note a verb that the server has carried out."""
        if verb == "SystemSharedMemoryRegister":
            self._requests[request.name] = request
        elif verb == "SystemSharedMemoryUnregister" and request.name:
            self._requests.pop(request.name, None)
        elif verb == "SystemSharedMemoryUnregister":
            self._requests.clear()

    def restore(self) -> None:
        """Begin to register all regions again."""
        self._restoring = asyncio.create_task(self._restore(self._restoring))

    async def restored(self) -> None:
        """Wait until a restoring that has begun is done."""
        if self._restoring is not None and not self._restoring.done():
            await asyncio.shield(self._restoring)

    async def close(self) -> None:
        await ended(self._restoring)

    async def _restore(self, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await earlier
        for name, request in list(self._requests.items()):
            try:
                await self._stub.SystemSharedMemoryRegister(request, timeout=REGISTER_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                    logger.warning("%s did not take the region %s again: %s", self._backend, name, error.details())


logger = logging.getLogger(__name__)

VERB_TIMEOUT_S = 30.0
FORGET_AGAIN_S = 0.05
CLOSE_TIMEOUT_S = 5.0
CONNECTIONS = count(1)
"""Numbers the loader's connections. A backend that replaces another at its address gets a higher number."""


class TritonBackend(Endpoint):
    """One Triton server."""

    WIRE_ERRORS = (grpc.RpcError,)

    def __init__(self, entry: TritonEntry, declared: EngineFacts, wiring: Wiring) -> None:
        self._entry = entry
        self._wiring = wiring
        self._connection = next(CONNECTIONS)
        self._channel: grpc.aio.Channel = open_channel(entry.address, entry.tls_files)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._pool = StreamPool(self._channel)
        self._regions = Regions(entry.identity, self._stub)
        self._transport = Transport(entry.identity, entry.weights_transport, wiring.memory, self._stub)
        self._server = Server(entry, declared, self._stub, self._transport)
        super().__init__(
            entry.identity, entry.address, entry.progress_timeout_s, self._server.pulse, entry.tls_files is not None
        )

    @property
    def streams(self) -> bool:
        """True if the model is decoupled; assumed until the server says."""
        return self._server.decoupled

    def _describe(self) -> str:
        return self._server.detail()

    async def _leave(self) -> None:
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
            logger.info("%s did not let go of our regions; the next sidecar that reaches it removes them", self.id)

    # Runs.

    def _begin(self, effect: Dispatch, ticket: Ticket) -> Run:
        dialect, model = self._server.dialect, self._model_of(ticket)
        run = Run(effect, ticket, self._post, self._heard, self._wire_broke, dialect, model)
        run.owner = wire.owner_fragment(self._wiring.owner, effect.epoch)
        return run

    async def _go(self, run: Run, weights: Weights | None) -> None:
        await self._regions.restored()
        await self._count(run)
        if weights is not None:
            run.attached = await self._attached(run, weights)
        if run.cancelled:
            run.over()
        elif not self._takes or run.refused() or await self._by_proxy(run):
            return
        elif run.ticket.payload.unary:
            await run.unary(self._pool)
        else:
            await run.stream(self._pool)

    async def _count(self, run: Run) -> None:
        """Have the tokens of an answer counted that comes all at once, unless a proxy may carry it unread."""
        payload = run.ticket.payload
        whole = Whole() if payload.prompt is not None and not self._server.decoupled else payload.whole
        if whole is not None or payload.outputs:
            tells = await self._server.tells(self._model_of(run.ticket) or payload.model)
            is_read = run.ticket.carrier is None or (payload.unary and self._server.decoupled)
            run.counter = Counter(whole, tells, run.ticket, is_read)

    async def _by_proxy(self, run: Run) -> bool:
        """Have a proxy carry a run, if one can; Triton itself refuses unary calls of decoupled models."""
        if run.ticket.payload.unary and self._server.decoupled:
            return False
        return await run.by_proxy(self.address, self.follower)

    def _model_of(self, ticket: Ticket) -> str:
        """Return the model for a request of ours; "" for a client's own, which names its model."""
        prompt = ticket.payload.prompt
        return "" if prompt is None else self.own_models[0] if prompt is Prompt.TEXT else self._entry.model

    @property
    def own_models(self) -> tuple[str, ...]:
        core = self._entry.model
        return (core,) if isinstance(self._server.dialect, LlmApi) else (self._entry.text_model, core)

    async def _attached(self, run: Run, weights: Weights) -> bytes:
        """Return a fragment that names or holds a run's weights; b"" if a client's typed contents allow neither."""
        region, raw = await self._transport.refer(weights), run.ticket.payload.raw
        if region is None and not raw:
            return b""
        fragment = wire.attached(weights.shape, weights.dtype, weights.config, region, weights.size_bytes, raw)
        if region is not None:
            return fragment
        content = await asyncio.to_thread(Path(weights.path).read_bytes)
        return fragment + wire.content_head(weights.size_bytes) + content[: weights.size_bytes]

    # Loads.

    async def _perform(self, effect: Load, weights: Weights) -> LoadResult:
        if isinstance(self._server.dialect, LlmApi):
            return await self._load_files(self._server.dialect, effect, weights)
        return await self._load_packed(effect, weights)

    async def _explained(self, result: LoadResult) -> bool:
        if result.fault is Fault.REJECTED and self._takes and await self._has_changed():
            self._close(CHANGED)
        return await super()._explained(result)

    async def _has_changed(self) -> bool:
        try:
            return await self._server.changed()
        except (grpc.RpcError, Misused):
            return False  # left to the watcher

    async def _load_packed(self, effect: Load, weights: Weights) -> LoadResult:
        """Send a blob or name its region; try once more if the server has forgotten the region."""
        target = Target(
            self.address,
            self._connection,
            self._entry.model,
            self._server.decoupled,
            self._entry.tls_files,
            self._wiring.owner,
        )
        sent = partial(self._load_sent, effect.load)
        region = await self._transport.refer(weights)
        result = await self._wiring.loader.load(effect, weights, target, self._entry.load_timeout_s, sent, region)
        if region is not None and result.fault is Fault.UNKNOWN_REGION:
            self._transport.doubt()
            region = await self._transport.refer(weights)
            result = await self._wiring.loader.load(effect, weights, target, self._entry.load_timeout_s, sent, region)
        return result

    async def _load_files(self, dialect: LlmApi, effect: Load, weights: Weights) -> LoadResult:
        """Make the engine answer a token with an adapter whose files it can read."""
        await weights.ready()
        self._load_sent(effect.load)
        request = dialect.load(self._entry.model, effect)
        wire.set_parameters(request, wire.owner_parameters(self._wiring.owner, effect.epoch))
        try:
            error = await answer_of(self._stub, request, self._server.decoupled, self._entry.load_timeout_s)
        except grpc.aio.AioRpcError as failed:
            text = failed.details() or failed.code().name
            if is_late(failed):
                return LoadResult(
                    f"the engine did not take the adapter within {self._entry.load_timeout_s:g} s", unanswered=True
                )
            return LoadResult(text, lost=wire.is_lost(failed.code(), text))
        return LoadResult(error)

    # Shared memory: clients' regions and the store's.

    def register_regions(self) -> None:
        self._transport.doubt()
        self._regions.restore()

    async def forget(self, region: str) -> None:
        while self._up:
            try:
                await self._transport.forget(region)
                return
            except grpc.RpcError as error:
                logger.info("%s does not let go of %s yet: %s", self.id, region, wire.describe(error))
            await asyncio.sleep(FORGET_AGAIN_S)
        self._transport.lost(region)

    async def call(self, verb: str, request: Any) -> Any:
        """Pass on a KServe verb unchanged. Raises grpc.RpcError with the server's own status."""
        reply = await getattr(self._stub, verb)(request, timeout=VERB_TIMEOUT_S)
        self._regions.note(verb, request)
        return reply

    # Watching.

    async def _reach(self) -> EngineFacts:
        facts = await self._server.reach()
        self._regions.restore()
        await self._regions.restored()
        return facts

    async def _look(self) -> str | None:
        return await self._server.look()

    async def _inside(self) -> int | None:
        return await self._server.inside()

    def _seen_inside(self) -> int | None:
        return self._server.seen_inside

    async def _steps(self) -> int | None:
        return await self._server.steps()

    async def _answers(self, within_s: float) -> bool:
        return await self._server.answers(within_s)

    def _measures(self) -> BackendMeasured | None:
        return self._server.measured()

    async def _look_after(self, text: str) -> None:
        """Look at a server after bad news: a broken connection, or an error that may mean its engine is gone."""
        try:
            await self._server.ready()
            if await self._server.changed():
                self._close(CHANGED)
                return
            is_there = faults.classify(text) is not Fault.LOST or await self._answers(self._entry.progress_timeout_s)
        except Misused as unready:
            self._close(unready.message)
            return
        except grpc.RpcError:
            is_there = False
        if self._up and not is_there:
            self._lose(text)

    def _was_lost(self) -> None:
        self._server.distrust()
        self._connection = next(CONNECTIONS)
        self._pool.close()

    @staticmethod
    def _is_late(error: Exception) -> bool:
        return isinstance(error, grpc.RpcError) and is_late(error)

    @staticmethod
    def _error_text(error: Exception) -> str:
        return wire.describe(error) if isinstance(error, grpc.RpcError) else str(error)
