"""One toy engine as the shell sees it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace
from time import monotonic
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.backends.api import LoadResult, Reply, Ticket, Weights
from sidecar.backends.endpoint import Endpoint
from sidecar.backends.pulse import Pulse
from sidecar.core.effects import Dispatch, Load
from sidecar.core.enums import Fault
from sidecar.core.events import FirstToken, RunEnded, RunFailed
from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused, Reason
from tests.conformance.toy.kind import ToyEntry

PATIENCE_S = 5.0
LINE_BYTES_MAX = 1 << 24
FAULTS = {"miss": Fault.MISS, "full": Fault.FULL}
"""What the engine's own codes mean."""
READY = {
    "ServerLive": service_pb2.ServerLiveResponse(live=True),
    "ServerReady": service_pb2.ServerReadyResponse(ready=True),
    "ModelReady": service_pb2.ModelReadyResponse(ready=True),
}


async def lines(address: str, question: bytes) -> AsyncIterator[dict[str, Any]]:
    """Put a question to an engine and yield the lines of its answer. Raises OSError when it is away."""
    reader, writer = await asyncio.open_connection(*address.rsplit(":", 1), limit=LINE_BYTES_MAX)
    try:
        writer.write(question + b"\n")
        while line := await reader.readline():
            yield json.loads(line)
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def ask(address: str, **question: Any) -> dict[str, Any]:
    """Return the one line that answers a question. Raises OSError when the engine is away."""
    async with asyncio.timeout(PATIENCE_S), aclosing(lines(address, json.dumps(question).encode())) as answer:
        async for record in answer:
            return record
    raise ConnectionResetError("the connection was closed without an answer")


class ToyRun:
    """One request on its way through the engine."""

    def __init__(self, backend: ToyBackend, effect: Dispatch, ticket: Ticket) -> None:
        self.effect = effect
        self.ticket = ticket
        self.tokens = 0
        self.cancelled = False
        self.waits_for_client = False
        self._backend = backend
        self._payload = ticket.payload  # the ticket's own is emptied when the request is settled
        self._work: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        """Close the connection: the engine frees its seat."""
        self.cancelled = True
        if self._work is not None:
            self._work.cancel()

    async def go(self) -> None:
        """Send the request and deliver what comes. Raises CancelledError when it is cancelled."""
        self._work = asyncio.current_task()
        if self.cancelled:
            raise asyncio.CancelledError
        try:
            async with aclosing(lines(self._backend.address, self._question())) as answer:
                async for record in answer:
                    if "error" in record:
                        self._failed(FAULTS.get(record["code"], Fault.REJECTED), record["error"])
                        return
                    if self._take(record):
                        return
                    await self._room()
            raise ConnectionResetError("the answer ended before it was complete")
        except OSError as error:
            if not await self._backend.wire_broke(str(error), self.tokens > 0):
                self._failed(Fault.LOST, str(error))

    def _question(self) -> bytes:
        head = self._payload.head_for(self._backend.entry.model.name)
        assert isinstance(head, bytes)
        question: dict[str, Any] = {"adapter": self.effect.packed_key}
        if self._backend.entry.speaks == "toy":
            return json.dumps(question | {"do": "run"}).encode()[:-1] + b',"ask":' + head + b"}"
        message = base64.b64encode(head).decode()
        return json.dumps(question | {"do": "infer", "stream": not self._payload.unary, "message": message}).encode()

    def _take(self, record: dict[str, Any]) -> bool:
        """Deliver one line; return whether it was the last."""
        final, is_first = record["end"], not self.tokens
        if self._backend.entry.speaks == "toy":
            count, reply = len(record["tokens"]), Reply(json.dumps(record).encode(), None, final)
        else:
            count, reply = record["tokens"], self._kserve_reply(base64.b64decode(record["message"]), final)
        self.tokens += count
        self._backend.heard(self.effect.request, count)
        self.ticket.deliver(reply, count)
        key = (self.effect.request, self.effect.attempt)
        if final:
            self._backend.post(RunEnded(*key, self.tokens))
        elif is_first:
            self._backend.post(FirstToken(*key))
        return final

    def _kserve_reply(self, raw: bytes, final: bool) -> Reply:
        response = service_pb2.ModelInferResponse.FromString(raw)
        if self._payload.unary:
            return Reply(raw, response, final)
        return Reply(service_pb2.ModelStreamInferResponse(infer_response=response).SerializeToString(), response, final)

    async def _room(self) -> None:
        """Wait until the client has taken enough of what has come."""
        if not self.ticket.has_room:
            self.waits_for_client = True
            await self.ticket.room()
            self.waits_for_client = False
            self._backend.heard(self.effect.request, 0)

    def _failed(self, fault: Fault, text: str) -> None:
        if fault is Fault.REJECTED:
            self.ticket.rejected_with = grpc.StatusCode.INVALID_ARGUMENT
        self._backend.post(RunFailed(self.effect.request, self.effect.attempt, fault, text, self.tokens))


class ToyBackend(Endpoint):
    """One toy engine. An adapter's name there is its packed key."""

    WIRE_ERRORS = (OSError,)
    streams = True

    def __init__(self, entry: ToyEntry, declared: EngineFacts) -> None:
        pulse = Pulse(entry.progress_timeout_s, monotonic())
        super().__init__(entry.identity, entry.address, entry.progress_timeout_s, pulse)
        self.entry = entry
        self._declared = declared
        self._hello: dict[str, Any] = {}

    # What a run needs.

    def post(self, event: Any) -> None:
        self._post(event)

    def heard(self, request: int, tokens: int) -> None:
        self._heard(request, tokens)

    async def wire_broke(self, text: str, begun: bool) -> bool:
        return await self._wire_broke(text, begun)

    # Reaching and looking.

    async def _reach(self) -> EngineFacts:
        self._hello = await ask(self.address, do="hello")
        if self._hello["speaks"] != self.entry.speaks:
            raise Misused(
                Reason.CONFIG_INVALID,
                f"{self.id}: the engine speaks {self._hello['speaks']}; set speaks: {self._hello['speaks']}",
            )
        self.pulse.begin(monotonic())
        self.pulse.counted(self._hello["steps"], monotonic())
        slots = self._declared.device_pages or self._hello["slots"]
        return replace(
            self._declared,
            models=(self.entry.model.name,),
            device_pages=slots,
            host_pages=slots,
            seats=self._declared.seats or self._hello["seats"],
        )

    async def _look(self) -> str | None:
        before, self._hello = self._hello, await ask(self.address, do="hello")
        self.pulse.seen(monotonic())
        self.pulse.counted(self._hello["steps"], monotonic())
        return None if self._hello["start"] == before["start"] else "it has restarted"

    async def _steps(self) -> int | None:
        return int((await ask(self.address, do="hello"))["steps"])

    async def _answers(self, within_s: float) -> bool:
        question = {"prompt": "a", "max_tokens": 1, "stream": False}
        async with asyncio.timeout(within_s):
            return "end" in await ask(self.address, do="run", adapter="", ask=question)

    async def _look_after(self, text: str) -> None:
        try:
            restarted = await self._look()
        except OSError:
            restarted = text
        if restarted is not None and self._up:
            self._lose(restarted)

    def _describe(self) -> str:
        return f"reached, {self._hello['adapters']} of {self._hello['slots']} slots taken"

    # Adapters and runs.

    async def _perform(self, effect: Load, weights: Weights) -> LoadResult:
        await weights.ready()
        shared_dir = self.entry.shared_dir
        assert shared_dir is not None, "an adapter for an engine without a shared folder"
        self._load_sent(effect.load)
        path = shared_dir.engine_path(effect.packed.key)
        try:
            reply = await ask(self.address, do="load", name=effect.packed.key, path=path)
        except TimeoutError:
            return LoadResult(f"the engine did not take the adapter within {PATIENCE_S:g} s", unanswered=True)
        except OSError as error:
            return LoadResult(str(error), lost=True)
        return LoadResult(reply.get("error"), means=FAULTS.get(reply.get("code", "")))

    async def forget(self, key: str) -> None:
        if self._up:
            with suppress(OSError):
                await ask(self.address, do="forget", name=key)

    def _begin(self, effect: Dispatch, ticket: Ticket) -> ToyRun:
        return ToyRun(self, effect, ticket)

    async def _go(self, run: ToyRun, weights: Weights | None) -> None:
        await run.go()

    async def _leave(self) -> None:
        """There is nothing open: every question has a connection of its own."""

    async def call(self, verb: str, request: Any) -> Any:
        if verb in READY:
            return READY[verb]
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.UNIMPLEMENTED, grpc.aio.Metadata(), grpc.aio.Metadata(), f"the toy engine has no {verb}"
        )
