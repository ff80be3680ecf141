"""Run requests at a Triton server: on a pool of streams with one live request each, or as unary calls.

Triton cancels whole streams, and `ensemble` has no `stop` input. So a stream has one live request; it is reused after a
clean end, and cancelled when its client leaves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from sidecar.backends import faults, wire
from sidecar.backends.api import UNTOLD, WEIGHTS_ID, Reply, Ticket
from sidecar.backends.http_client import Answer, ProxyTimedOut, Request, Unseen, WireError
from sidecar.backends.quoting import wrote_in
from sidecar.backends.triton.counting import Counter
from sidecar.backends.triton.dialects import Dialect
from sidecar.backends.triton.framing import PREFIX, framed, messages_of, status_in
from sidecar.backends.unseen import Follower, Read, first_token
from sidecar.core.effects import Dispatch
from sidecar.core.enums import Fault, Seen
from sidecar.core.events import Event, RunEnded, RunFailed

IDLE_STREAMS_MAX = 256
Metadata = tuple[tuple[str, str], ...]
END_OF_STREAM: Any = grpc.aio.EOF  # type: ignore[attr-defined]


def unchanged(message: bytes) -> bytes:
    return message


class EngineGone(Exception):
    """The server's error may mean that its model or process is gone or replaced."""


class StreamPool:
    """Idle `ModelStreamInfer` calls, and the method for unary ones."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._method: Any = channel.stream_stream(
            f"{wire.SERVICE}/ModelStreamInfer", request_serializer=unchanged, response_deserializer=unchanged
        )
        self.unary: Any = channel.unary_unary(
            f"{wire.SERVICE}/ModelInfer", request_serializer=unchanged, response_deserializer=unchanged
        )
        self._idle: deque[Any] = deque()

    def take(self, metadata: Metadata = ()) -> Any:
        """Return an idle stream, or a new one. One with metadata is for a single request."""
        if metadata:
            return self._method(metadata=metadata)
        while self._idle:
            call = self._idle.pop()
            if not call.done():
                return call
        return self._method()

    def give_back(self, call: Any, metadata: Metadata = ()) -> None:
        """Keep a stream whose request ended cleanly, unless it was for that request alone."""
        if not metadata and not call.done() and len(self._idle) < IDLE_STREAMS_MAX:
            self._idle.append(call)
        else:
            call.cancel()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().cancel()


class Run:
    """One dispatched request on the engine.

    `heard(request, tokens)` is called for each response. `broken(text, has_begun)` is called when the connection broke
    or the engine's error suggests that it is gone; it returns True if the backend's loss ends this run.
    """

    def __init__(
        self,
        effect: Dispatch,
        ticket: Ticket,
        post: Callable[[Event], None],
        heard: Callable[[int, int], None],
        broken: Callable[[str, bool], Any],
        dialect: Dialect,
        model: str = "",
    ) -> None:
        self.effect = effect
        self.ticket = ticket
        self._payload = ticket.payload
        """Kept here: the ticket drops its payload's bytes when the request is settled."""
        self.tokens = 0
        self.cancelled = False
        self.waits_for_client = False
        self._unseen: Unseen | None = None
        self.goes_past = False
        self._work: asyncio.Task[Any] | None = None
        self._post = post
        self._heard = heard
        self._broken = broken
        self._call: Any = None
        self._dialect = dialect
        self.counter = Counter()
        self._model = wire.model_field(model) if model else b""
        self.owner = b""
        """Fragment naming the replica that sends the request."""
        self.attached = b""
        """Fragment naming or holding its weights, if they are sent along."""
        self._known_as(WEIGHTS_ID if effect.request == UNTOLD else f"{effect.request}.{effect.attempt}")

    def _known_as(self, engine_id: str) -> None:
        """Set the id that the engine sees. Clients' ids may collide, ours do not."""
        self.engine_id, self._wire_id = engine_id, wire.id_field(engine_id)

    def message(self, stream: bool) -> bytes:
        fragment = self._dialect.fragment(self.engine_id, self.effect, self._payload.raw, stream)
        head = self._payload.head_for(self._dialect.kind)
        assert isinstance(head, bytes), "a request in HTTP's form for a gRPC server"
        asks = self.counter.fragment(self._payload.raw)
        return head + self._model + fragment + asks + self.owner + self.attached

    def refused(self) -> bool:
        """Post a failure and return True if the request was written for another kind of model than this one."""
        kinds = self._payload.kinds
        if self._dialect.kind in kinds:
            return False
        text = f"the request is for a model of kind {' or '.join(kinds)} and this one is {self._dialect.kind}"
        self._failed(Fault.REJECTED, f"{text}; send it again")
        return True

    def cancel(self) -> None:
        """Cancel the run: the engine frees its seat when the stream is cancelled.

        The task is cancelled too. A read or write under way may never return once its call is cancelled, and a client
        that has left takes nothing from the ticket.
        """
        self.cancelled = True
        if self._call is not None:
            self._call.cancel()
        if self._work is not None and not self.goes_past:  # what goes past us cannot be ended from here
            self._work.cancel()

    def over(self) -> None:
        """Post the end of the run."""
        seen = Seen.ESTIMATED if self.counter.is_estimated else Seen.ALL
        self._post(RunEnded(self.effect.request, self.effect.attempt, self.tokens, seen))

    async def stream(self, pool: StreamPool) -> None:
        """Run on a stream of the pool. Raises CancelledError if it is cancelled."""
        self._work = asyncio.current_task()
        metadata = self._trace_context()
        call = self._call = pool.take(metadata)
        try:
            await call.write(self.message(stream=True))
            while True:
                raw = await call.read()
                if raw is END_OF_STREAM:
                    await self._stream_closed(call)
                    return
                if self._take(raw):
                    break
                if not self.ticket.has_room:
                    await self._room()
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            await self._wire_broke(error)
        except EngineGone as gone:
            pool.give_back(call, metadata)
            await self._ended_with(None, str(gone))
        else:
            if self.cancelled:
                call.cancel()
            else:
                pool.give_back(call, metadata)

    def _trace_context(self) -> Metadata:
        return () if self.ticket.trace is None else self.ticket.trace.headers(self.effect.attempt)

    async def _room(self) -> None:
        """Wait for the client. Nothing is read meanwhile, so the engine cannot be blamed for silence."""
        self.waits_for_client = True
        await self.ticket.room()
        self.waits_for_client = False
        self._heard(self.effect.request, 0)

    def _take(self, raw: bytes) -> bool:
        """Deliver one response; return True if it was the last. Nothing is delivered after a cancel."""
        if self.cancelled:
            raise asyncio.CancelledError
        if self.tokens and not self.counter.reads_all and wire.is_one_of_many(raw, self._wire_id):
            self.tokens += 1
            self._heard(self.effect.request, 1)
            self.ticket.deliver(Reply(raw, None, False))
            return False
        message = wire.ModelStreamInferResponse.FromString(raw)
        response = message.infer_response
        if response.id not in ("", self.engine_id):
            self._heard(self.effect.request, 0)
            return False  # the stream's previous request sent more after its end
        if message.error_message:
            self._heard(self.effect.request, 0)
            fault = self._fault(message.error_message)
            if self._doubts_engine(fault):
                raise EngineGone(message.error_message)
            self._failed(fault, message.error_message)
            return True
        final = wire.is_final(response.parameters)
        tokens = self.counter.take(response)
        raw = message.SerializeToString() if self.counter.hides else raw
        is_first = tokens > 0 and self.tokens == 0
        self.tokens += tokens
        self._heard(self.effect.request, tokens)
        self.ticket.deliver(Reply(raw, response, final), tokens)  # before the core's event: the client is first
        if final:
            self.over()
        elif is_first:
            self._post(first_token(self, self._unseen))
        return final

    async def by_proxy(self, address: str, follower: Follower) -> bool:
        """Have a proxy carry the request, if one can; return False if it is to be sent from here.

        The client's own id goes along, since the engine's messages reach it unchanged, and no empty last message is
        asked for: the end of the call tells.
        """
        carrier = self.ticket.carrier
        if carrier is None:
            return False
        self._work = asyncio.current_task()
        ours = self.engine_id
        self._known_as(carrier.answer_id)
        method = "ModelInfer" if self._payload.unary else "ModelStreamInfer"
        headers = {"content-type": "application/grpc", "te": "trailers", **dict(self._trace_context())}
        body = framed(self.message(stream=False))
        request = Request(address, f"{wire.SERVICE}/{method}", headers, (body,))
        try:
            answer = await carrier.carry(request)
            if answer is None:
                self._known_as(ours)
                return False
            await self._carried(answer, follower)
        except ProxyTimedOut as error:
            self._failed(Fault.REJECTED, str(error), grpc.StatusCode.DEADLINE_EXCEEDED)
        except WireError as error:
            await self._ended_with(grpc.StatusCode.UNAVAILABLE, str(error))
        except EngineGone as gone:
            await self._ended_with(None, str(gone))
        return True

    async def _carried(self, answer: Answer, follower: Follower) -> None:
        """Read an answer that a proxy brings, as far as it comes here."""
        if answer.is_unread:  # a status alone
            code, text = status_in(answer.headers)
            await self._ended_with(code or grpc.StatusCode.UNAVAILABLE, text or f"it answers {answer.status}")
            return
        unseen = self._unseen = answer.unseen
        try:
            await self._read_carried(answer, unseen, follower)
        finally:
            if unseen is not None and not self.goes_past:
                unseen.close()

    async def _read_carried(self, answer: Answer, unseen: Unseen | None, follower: Follower) -> None:
        read = Read(0)
        async for raw in messages_of(answer.chunks):
            if self._payload.unary:
                self._take_whole(raw)
                return
            read.size_bytes += len(raw) + PREFIX.size
            if self._take(raw):
                return
            read.tokens, read.token_bytes = self.tokens, len(raw) + PREFIX.size if self.tokens else 0
        if unseen is not None and unseen.goes_on:
            await follower.follow(self, unseen, read, self._broke_off)
            return
        code, text = status_in(answer.trailers or answer.headers)
        if code is grpc.StatusCode.OK and self.tokens:
            self.over()
        else:
            await self._ended_with(code, text or "the answer ended before it was complete")

    async def _broke_off(self, cause: str) -> None:
        await self._ended_with(grpc.StatusCode.UNAVAILABLE, cause)

    async def unary(self, pool: StreamPool) -> None:
        """Run as one `ModelInfer` call. Raises CancelledError if it is cancelled."""
        self._work = asyncio.current_task()
        call = self._call = pool.unary(self.message(stream=False), metadata=self._trace_context())
        try:
            raw = await call
        except grpc.RpcError as error:
            await self._wire_broke(error)
        else:
            if self.cancelled:
                self.over()
                return
            self._take_whole(raw)

    def _take_whole(self, raw: bytes) -> None:
        """Deliver the answer to a unary call."""
        response = wire.ModelInferResponse.FromString(raw)
        self.tokens = self.counter.take(response)
        raw = response.SerializeToString() if self.counter.hides else raw
        self._heard(self.effect.request, self.tokens)
        self.ticket.deliver(Reply(raw, response, True), self.tokens)
        self.over()

    async def _stream_closed(self, call: Any) -> None:
        code = await call.code()
        if self.cancelled:
            self.over()
            return
        text = await call.details() or f"the stream ended with {code.name} before the answer was complete"
        await self._ended_with(code, text)

    async def _wire_broke(self, error: Exception) -> None:
        if self.cancelled:
            self.over()
        elif isinstance(error, grpc.aio.AioRpcError):
            await self._ended_with(error.code(), error.details() or error.code().name)
        else:
            await self._stream_closed(self._call)

    async def _ended_with(self, code: grpc.StatusCode | None, text: str) -> None:
        fault = self._fault(text, code)
        if self._doubts_engine(fault) and await self._broken(text, self.tokens > 0):
            return  # the backend's loss ends this run, too
        self._failed(fault, text, code)

    def _fault(self, text: str, code: grpc.StatusCode | None = None) -> Fault:
        wrote = wrote_in(self._payload.head_for(self._dialect.kind))
        fault = faults.classify(text, wrote)
        is_lost = fault is Fault.REJECTED and code is not None and wire.is_lost(code, text, wrote)
        return Fault.LOST if is_lost else fault

    def _doubts_engine(self, fault: Fault) -> bool:
        """Return True if an error may mean a replaced engine, which has no adapters yet or refuses attached weights."""
        return fault in (Fault.LOST, Fault.MISS) or (fault is Fault.REJECTED and bool(self.attached))

    def _failed(self, fault: Fault, text: str, code: grpc.StatusCode | None = None) -> None:
        if code is not None:
            self.ticket.rejected_with = code
        self._post(RunFailed(self.effect.request, self.effect.attempt, fault, text, self.tokens))
