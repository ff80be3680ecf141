"""One request that Envoy asks about.

For the front it is a client's connection: an ASGI scope with `receive` and `send`. For the run it is the carrier: Envoy
sends what the run would send to its engine, and what the engine answers comes from Envoy. So one front, one core and
one backend serve both lanes, and only this package knows Envoy's order of messages.

How an answer comes back depends on the mode that the gateway sets for it:

* FULL_DUPLEX_STREAMED: every chunk comes here, and the front's own bytes go back.
* STREAMED: the chunks of a stream of events go on as they are, up to the first with a token. Then this call is closed,
  and Envoy's access log tells the rest. An answer in one body comes here whole.
* NONE: the log tells all but the head.
* BUFFERED: the answer comes here whole, at its end.

An answer of an engine's that must not reach the client is held at its head, and ours takes its place. Nothing is closed
under a full-duplex answer: chunks that Envoy has sent here would be lost.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from enum import Enum
from http import HTTPStatus
from time import monotonic
from typing import Any

import grpc
import grpc.aio
from starlette.types import Message

from sidecar.backends.http_client import Answer, NotReached, Request, WireError, chunks_of
from sidecar.config.listeners import EndpointPickerListener
from sidecar.fronts.extproc import heads, replies
from sidecar.fronts.extproc.access_log import AccessLog, Watched
from sidecar.fronts.extproc.openings import Events, Opening, Verdict
from sidecar.fronts.extproc.replies import Reply
from sidecar.fronts.extproc.ways import Way
from sidecar.proto import envoy_pb2 as envoy

logger = logging.getLogger(__name__)

CHUNKS_MAX = 8
"""Chunks of a request's body that wait for the front before no more are read."""
OWN_BYTES_MAX = 64 << 20
"""Bytes of an answer of ours that waits to be complete, where the gateway takes it at once only."""
EVENTS, ORIGIN = "text/event-stream", b"x-lora-backend"
FULL_DUPLEX = envoy.FULL_DUPLEX_STREAMED


class Phase(Enum):
    HELD = "held"
    """Envoy waits to hear where the request goes."""
    SENT = "sent"
    """The request is on its way to an engine."""
    ANSWERING = "answering"
    """The head of an answer has come."""
    CLOSED = "closed"


class Aborted(Exception):
    """The answer cannot be completed: Envoy must cut it."""


class Elsewhere:
    """Answers that did not come from the engine that was picked. `named` returns the backend at an address, or ""."""

    def __init__(self, named: Callable[[str], str]) -> None:
        self.count = 0
        self._named = named

    def corrected(self, head: Iterable[tuple[bytes, bytes]], served: str) -> Iterable[tuple[bytes, bytes]]:
        """Return the headers of an answer from elsewhere, with the name of the engine that has answered."""
        for name, value in head:
            yield name, (self._named(served) or served).encode() if name == ORIGIN else value

    def note(self, picked: str, served: str) -> bool:
        """Return True for an answer from elsewhere."""
        if is_elsewhere := served not in ("", picked):
            self.count += 1
            if self.count == 1:
                logger.warning(
                    "a gateway sent a request to %s, and not to %s as it was told: its cluster must take its endpoint "
                    "from the header %s and the metadata of the same name; see picker_elsewhere_total",
                    served, picked, replies.DESTINATION,
                )  # fmt: skip
        return is_elsewhere


class Exchange:
    """One call of `Process`. `write` sends a reply to Envoy; `finished` is done when Envoy needs nothing more."""

    def __init__(
        self,
        first: envoy.ProcessingRequest,
        write: Callable[[Reply], Awaitable[Any]],
        log: AccessLog,
        elsewhere: Elsewhere,
        settings: EndpointPickerListener,
        way: Way,
    ) -> None:
        self._first = first
        self._write_one, self._log, self._elsewhere = write, log, elsewhere
        self._is_duplex = first.protocol_config.request_body_mode == FULL_DUPLEX
        self._mode = first.protocol_config.response_body_mode
        self._overrides_mode = settings.override_mode and not self._is_duplex
        self._settings = settings
        self._way, self.estimates = way, settings.estimates_allowed
        self._is_redirected = False
        self._writing = asyncio.Lock()
        self._id = secrets.token_hex(8)
        self._mark = {replies.EXCHANGE: self._id, replies.REPLICA: log.replica}
        self._began_s = monotonic()
        self._phase = Phase.HELD
        self._pieces: asyncio.Queue[tuple[bytes, bool] | None] = asyncio.Queue()
        """The client's body, each piece with whether more comes; None once the client has left."""
        self._body_has_come = self._has_trailers = False
        self._room = asyncio.Event()
        self._gone = asyncio.Event()
        self._head: asyncio.Future[envoy.ProcessingRequest] | None = None
        self._is_resent = asyncio.Event()
        """What has come of a request that is passed on has been written: the rest of its body may follow."""
        self._is_resent.set()
        self._is_judged = asyncio.Event()
        """It is known what becomes of the head."""
        self._sent_to = ""
        """The engine that has got all of the request."""
        self._chunks: asyncio.Queue[tuple[bytes | WireError, bool]] = asyncio.Queue()
        """The engine's answer, each chunk with whether it is the last; an error breaks it off."""
        self._watched: Watched | None = None
        self._is_local = False
        """The head that has come is Envoy's own."""
        self._gone_status: int | None = None
        """The status of the head that has gone to the client."""
        self._opening: Opening = Events()
        self._unsure = b""
        """The beginning of an answer that may be an error's."""
        self._gathers = self._has_all = False
        """The engine's answer is replaced at its end by the front's; the engine's last chunk has come."""
        self._start: Message | None = None
        self._own: list[bytes] = []
        self._own_bytes = 0
        self._is_own_whole = self._passes = self._has_no_body = self._is_stream = False
        self._engines_own: tuple[str, ...] = ("content-length",)
        """Headers of the engine's that are not for its client, and the length of a body that is replaced."""
        self._served = ""
        """The engine that has answered, if it is not the one that was picked."""
        self.answer_id = ""
        self.head: Callable[[], Iterable[tuple[bytes, bytes]]] = tuple
        """Returns the headers of an answer that are ours. Set by the front once it has a ticket."""
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def where(self) -> str:
        """A word for where the request is; "answering" also once nothing more is expected."""
        return self._phase.value if self._phase is not Phase.CLOSED else Phase.ANSWERING.value

    # What Envoy sends.

    async def begin(self) -> None:
        """Take the first message, which has the request's head."""
        if self._first.request_headers.end_of_stream:
            self._body_has_come = True
            self._pieces.put_nowait((b"", False))
        elif not self._is_duplex:
            if self._overrides_mode:
                self._mode = envoy.STREAMED
            await self._write(replies.later(self._mode if self._overrides_mode else None))

    def pass_on(self) -> None:
        """Let the answer go on as it comes, unread."""
        self._phase, self._passes = Phase.SENT, True

    async def take(self, message: envoy.ProcessingRequest) -> None:
        """Take another message. Some may still come after the last that was wanted."""
        if self._phase is Phase.CLOSED:
            return
        kind = message.WhichOneof("request")
        if kind in ("request_body", "request_trailers"):
            await self._is_resent.wait()
        if kind == "request_body" and self._passes:
            body = message.request_body
            for reply in replies.bodies((body.body,), of_request=True, ended=body.end_of_stream):
                await self._write(reply)
        elif kind == "request_body":
            await self._take_body(message.request_body)
        elif kind == "request_trailers":
            await self._take_trailers()
        elif self._passes or (kind == "response_headers" and self._phase is Phase.HELD):
            await self._pass(message)
        elif kind == "response_headers":
            self._take_head(message)
        elif kind == "response_body":
            if self._phase is not Phase.ANSWERING:
                self.abort("the gateway has sent a part of an answer before its head")
                return
            await self._is_judged.wait()  # a chunk may come before the run has seen the head
            await self._take_chunk(message.response_body)
        elif kind == "response_trailers":
            await self._take_trailers_of_answer(message.response_trailers)

    async def _pass(self, message: envoy.ProcessingRequest) -> None:
        """Let an answer go on that is not ours: one in path, or Envoy's own to a request that it holds no longer."""
        if not self._passes:
            self._passes = True
            self._leave()
        if message.WhichOneof("request") == "response_headers":
            if self._is_redirected:
                self._way.judge(message)
            await self._write(Reply(response_headers=envoy.HeadersResponse()))
            if message.response_headers.end_of_stream or self._mode == envoy.NONE:
                self._close()
        elif message.WhichOneof("request") == "response_body":
            body = message.response_body
            if self._mode == FULL_DUPLEX:
                for reply in replies.bodies((body.body,), of_request=False, ended=body.end_of_stream):
                    await self._write(reply)
            else:
                await self._write(replies.chunk(None))
            if body.end_of_stream or self._mode != FULL_DUPLEX:
                self._close()
        else:
            await self._write(replies.trailers())

    def over(self) -> None:
        """Note that the front does nothing more: a call without an answer is cut."""
        if self._phase is not Phase.CLOSED and not self._passes and self._start is None and not self._gone.is_set():
            self.abort("there is no answer")

    @property
    def is_left(self) -> bool:
        """True if its client has left, or the call was cut."""
        return self._gone.is_set()

    def left(self) -> None:
        """Note that Envoy has ended the call, as it does when the client leaves."""
        if self._phase is not Phase.CLOSED:
            self._phase = Phase.CLOSED
            self._unwatch()
            self._leave()

    async def _take_body(self, body: envoy.HttpBody) -> None:
        if self._body_has_come:
            return  # Envoy repeats the end of a large body
        self._body_has_come = body.end_of_stream
        self._pieces.put_nowait((body.body, not body.end_of_stream))
        while self._pieces.qsize() > CHUNKS_MAX and self._phase is Phase.HELD:
            self._room.clear()
            await self._room.wait()

    async def _take_trailers_of_answer(self, trailers: envoy.HttpTrailers) -> None:
        self._chunks.put_nowait((b"", True))
        if self._gathers:
            self.abort("the engine's answer ends with trailers, after which no body can be put in its place")
        elif self._mode != FULL_DUPLEX:
            await self._write(replies.trailers(()))

    async def _take_trailers(self) -> None:
        self._has_trailers = True
        if self._passes:
            await self._write(replies.request_trailers())
        if not self._body_has_come:
            self._body_has_come = True
            self._pieces.put_nowait((b"", False))

    def _take_head(self, message: envoy.ProcessingRequest) -> None:
        self._is_local = heads.is_envoys_own(message)
        self._phase = Phase.ANSWERING
        if message.response_headers.end_of_stream:
            self._has_all = self._has_no_body = True
            self._chunks.put_nowait((b"", True))
        if self._head is not None and not self._head.done():
            self._head.set_result(message)

    async def _take_chunk(self, chunk: envoy.HttpBody) -> None:
        self._chunks.put_nowait((chunk.body, chunk.end_of_stream))
        if self._mode == FULL_DUPLEX:
            return
        verdict = None if self._gathers else self._opening.take(chunk.body, chunk.end_of_stream)
        if verdict is Verdict.REPLACE:  # what the engine says of itself is not for clients
            self._gathers = self._is_stream = True
        if self._gathers:
            self._has_all = chunk.end_of_stream
            if self._has_all:
                await self._give_gathered()
            else:
                await self._write(replies.chunk(b""))  # all of it goes with the last
            return
        assert verdict is not None
        await self._give(verdict, chunk.body)
        if chunk.end_of_stream:
            self._close()
        elif verdict is Verdict.ENOUGH:
            self._let_go()

    async def _give(self, verdict: Verdict, piece: bytes) -> None:
        """Give a piece of the engine's answer to the client, after what was held of it; or hold it, too."""
        if verdict is Verdict.HOLD:
            self._unsure += piece
            await self._write(replies.chunk(b""))
            return
        await self._write(replies.chunk(self._unsure + piece if self._unsure else None))
        self._unsure = b""

    def end_request(self) -> None:
        """Take the body to be complete: the client keeps its side open, and what it still sends is dropped."""
        self._body_has_come = True

    @property
    def has_way(self) -> bool:
        """True if requests may go in path through the gateway."""
        return self._way.address is not None

    @property
    def hides_tokens(self) -> bool:
        """True if an answer of several messages goes past us."""
        return self._mode != FULL_DUPLEX

    # The front's connection.

    async def receive(self) -> Message:
        """Return the next part of the request, or that its client has left."""
        if not self._gone.is_set() and (not self._body_has_come or not self._pieces.empty()):
            piece = await self._pieces.get()
            self._room.set()
            if piece is not None:
                return {"type": "http.request", "body": piece[0], "more_body": piece[1]}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take the next part of the front's answer."""
        if self._phase is Phase.CLOSED or self._passes:
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        body, ended = message["body"], not message.get("more_body", False)
        if self._phase is Phase.ANSWERING and self._mode == FULL_DUPLEX and not (self._is_local or self._has_no_body):
            await self._stream(body, ended)
            return
        self._own.append(body)
        self._own_bytes += len(body)
        if self._own_bytes > OWN_BYTES_MAX:
            self.abort(f"an answer that cannot be streamed is longer than {OWN_BYTES_MAX} bytes")
            return
        self._is_own_whole = ended
        if self._gathers:
            await self._give_gathered()
        elif ended and self._gone_status is None:
            await self._answer_instead()

    async def _stream(self, body: bytes, ended: bool) -> None:
        """Send the next of a full-duplex answer."""
        assert self._start is not None
        if self._gone_status is None:
            self._gone_status = self._start["status"]
            await self._write(replies.head(self._gone_status, self._told(self._start["headers"]), self._engines_own))
        for reply in replies.bodies((*self._own, body), of_request=False, ended=ended):
            await self._write(reply)
        self._own.clear()
        if ended:
            self._close()

    async def _answer_instead(self) -> None:
        """Answer in the place of an engine whose head has not come, or is held."""
        assert self._start is not None
        # Envoy drops a body that is put behind a head that had none, and keeps its own answers.
        is_held = self._phase is Phase.ANSWERING and not (self._is_local or self._has_no_body)
        make = replies.replaced if is_held else replies.answered
        await self._write(make(self._start["status"], self._start["headers"], b"".join(self._own)))
        self._close()

    async def _give_gathered(self) -> None:
        """Give the front's answer in the place of the engine's last chunk, once both have come."""
        if not (self._has_all and self._is_own_whole) or self._phase is Phase.CLOSED:
            return
        assert self._start is not None
        body = b"".join(self._own)
        if self._start["status"] != self._gone_status:
            if not self._is_stream:
                self.abort("the answer broke off after its head")
                return
            body = b"data: " + body.replace(b"\n", b" ") + b"\n\n"
        await self._write(replies.chunk(body))
        self._close()

    # The run's carrier.

    async def redirect(self, body: bytes) -> bool:
        """Send a client's request as it came to the http listener; return False if there is no way to it.

        `body` is what the front has received so far; the rest follows it.
        """
        address = await self._way.resolved()
        if address is None or self._phase is not Phase.HELD:
            return False
        self.pass_on()
        self._is_redirected = True
        self._is_resent.clear()
        body += self._not_received()
        try:
            if self._is_duplex:
                await self._write(replies.routed(address, self._mark, (), ()))
                await self._send_body(body)
            else:
                await self._write(replies.routed_whole(address, self._mark, (), (), body))
        finally:
            self._is_resent.set()
        return True

    def _not_received(self) -> bytes:
        """Return what has come of the body and still waits for the front."""
        pieces = []
        while not self._pieces.empty():
            if (piece := self._pieces.get_nowait()) is not None:
                pieces.append(piece[0])
        self._room.set()
        return b"".join(pieces)

    async def carry(self, request: Request) -> Answer | None:
        """Have Envoy send a request, and return the engine's answer as far as it comes here.

        A request that has gone to the same engine already, whose owner gave it back since, is not sent again: the
        answer to the first is taken. Returns None if Envoy has been told otherwise, or speaks TLS to no engine: then
        the request is to be sent from here. Raises WireError.
        """
        if request.is_encrypted:
            return None
        address, body = await heads.resolved(request.address), b"".join(request.body)
        if self._phase is Phase.HELD:
            self._phase, self._head = Phase.SENT, asyncio.get_running_loop().create_future()
            self._watched = self._log.watch(self._id)
            await self._route(address, request, body)
            self._sent_to = address
        elif self._phase is Phase.CLOSED or self._sent_to != address or self._is_judged.is_set():
            self._is_judged.set()
            return None
        assert self._head is not None
        message = await asyncio.shield(self._head)
        try:
            if self._elsewhere.note(address, served := heads.served_by(message)):
                if self._is_failure(message):
                    raise self._elsewhere_failed(served)
                self._served = served
            return await self._answer_of(message)
        finally:
            self._is_judged.set()

    def _is_failure(self, message: envoy.ProcessingRequest) -> bool:
        """Return True for the head of an answer that the request may be sent again for."""
        status, _ = heads.answer_of(message)
        return status == HTTPStatus.NOT_FOUND or status >= HTTPStatus.INTERNAL_SERVER_ERROR

    @staticmethod
    def _elsewhere_failed(served: str) -> WireError:
        """Return the error for a failure at an engine that was not picked: it says nothing of the one that was."""
        return NotReached(f"the gateway sent it to {served}, which cannot answer it")

    async def _route(self, address: str, request: Request, body: bytes) -> None:
        added, removed = heads.changes(self._first, request, self._began_s)
        if self._is_duplex:
            await self._write(replies.routed(address, self._mark, added, removed))
            await self._send_body(body)
        else:
            await self._write(replies.routed_whole(address, self._mark, added, removed, body))

    async def _send_body(self, body: bytes) -> None:
        for reply in replies.bodies((body,), of_request=True, ended=self._body_has_come):
            await self._write(reply)
        if self._has_trailers:
            await self._write(replies.request_trailers())

    async def _answer_of(self, message: envoy.ProcessingRequest) -> Answer:
        """Return the engine's answer, and let its head go if it is what the client gets."""
        status, headers = heads.answer_of(message)
        self._engines_own = heads.engines_own(headers)
        if self._is_local:
            raise heads.not_reached(message, status)
        unseen = None
        if self._mode != FULL_DUPLEX:
            if status == HTTPStatus.NOT_FOUND or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                # Its body comes only once the head has gone, and the head may have to be replaced.
                return Answer(status, headers, chunks_of(), is_unread=True)
            if self._has_no_body and status == HTTPStatus.OK:  # nothing is no answer: its head is held
                return Answer(status, headers, self._read())
            is_stream = status == HTTPStatus.OK and headers.get("content-type", "").startswith(EVENTS)
            self._gathers = self._mode == envoy.BUFFERED or (self._mode == envoy.STREAMED and not is_stream)
            self._gone_status = status
            if not self._gathers:
                unseen = self._watched
            removed = [name for name in self._engines_own if self._gathers or name != "content-length"]
            await self._write(replies.head(None, self._told(self.head()), removed))
            if self._mode == envoy.NONE:
                self._let_go()
            elif self._has_all:
                self._close()
        return Answer(status, headers, self._read(), unseen=unseen)

    async def _read(self) -> AsyncIterator[bytes]:
        """Yield the engine's chunks as far as they come here."""
        ended = False
        while not ended:
            chunk, ended = await self._chunks.get()
            if isinstance(chunk, WireError):
                raise chunk
            if chunk:
                yield chunk

    def _let_go(self) -> None:
        """Close the call: what is still to come of the answer goes past us, and its access log is read."""
        assert self._watched is not None
        self._watched.goes_on, self._watched = True, None
        self._chunks.put_nowait((b"", True))
        self._close()

    def _told(self, headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
        return self._elsewhere.corrected(headers, self._served) if self._served else headers

    # Ends.

    def abort(self, why: str) -> None:
        """Have Envoy cut the request, or what there is of its answer."""
        if self._phase is Phase.CLOSED:
            return
        self._phase = Phase.CLOSED
        self._unwatch()
        self._leave()
        if not self.finished.done():
            self.finished.set_exception(Aborted(why))

    def _unwatch(self) -> None:
        if self._watched is not None:
            self._watched.close()
            self._watched = None

    def _leave(self) -> None:
        self._gone.set()
        self._pieces.put_nowait(None)
        self._room.set()

    def _close(self) -> None:
        self._phase = Phase.CLOSED
        self._unwatch()
        self._room.set()
        if not self.finished.done():
            self.finished.set_result(None)

    async def written(self) -> None:
        """Return once nothing is being written: gRPC does not end a call under a write, and says nothing to Envoy."""
        async with self._writing:
            return

    async def _write(self, reply: Reply) -> None:
        async with self._writing:  # gRPC takes one message at a time
            if self._phase is Phase.CLOSED:
                return  # the last reply has gone while this one waited
            try:
                await self._write_one(reply)
            except (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
                self.left()  # Envoy has ended the call meanwhile
