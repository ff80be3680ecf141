"""One gRPC call that Envoy asks about: an exchange whose answer has messages and, at its end, a status in trailers.

No trailers can be added to an answer that has none, so a call whose engine ended it by a status alone can only end by a
status. Else the status and the trailing metadata of the front take the place of the engine's. Therefore an engine gets
a unary call as a stream of one request: then it tells an error by a message, which the front's answer can replace.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from sidecar.backends import wire
from sidecar.backends.http_client import Answer, Request, chunks_of, joined
from sidecar.backends.triton.framing import framed, messages_of
from sidecar.fronts.extproc import heads, replies
from sidecar.fronts.extproc.exchange import FULL_DUPLEX, Exchange, Phase
from sidecar.fronts.extproc.openings import Messages, Verdict
from sidecar.proto import envoy_pb2 as envoy

STATUS, TEXT = "grpc-status", "grpc-message"
OK, INVALID_ARGUMENT, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 0, 3, 12, 13, 14
UNARY, STREAM = f"{wire.SERVICE}/ModelInfer", f"{wire.SERVICE}/ModelStreamInfer"
SEVERAL = "ModelInfer RPC doesn't support models with decoupled transaction policy"
"""Triton's own words."""
NO_WAY_BACK = "the engine's own status could not be taken back; send the request again"


class CallExchange(Exchange):
    """One call. `is_unary` says that its answer is one message, which comes here whole."""

    def __init__(self, is_unary: bool, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._is_unary = is_unary
        self.takes_one = self._settings.one_request_per_stream and self._is_duplex
        """A stream has one request, whether its client closes its side or not. Buffered bodies come once it has."""
        self._opening = Messages()
        self._trailers: dict[str, str] = {}
        self._trailers_have_come = self._is_held = self._has_given = False
        """The engine's trailers are here; its first message is held, for which ours stands in; the client has one."""
        self._held_chunks = 0
        """Chunks that wait for a reply behind the first."""
        self._ending: list[tuple[bytes, bytes]] | None = None
        """The front's status and trailing metadata."""

    async def carry(self, request: Request) -> Answer | None:
        if not self._is_unary or self._mode == envoy.NONE:  # without its body no message can be replaced
            return await super().carry(request)
        answer = await super().carry(replace(request, path=STREAM))
        return answer if answer is None or answer.is_unread else await _as_unary(answer)

    @property
    def is_answered(self) -> bool:
        """True if its client gets messages; else it can only get a status."""
        return self._gone_status is not None

    async def end(self, code: int, text: str, metadata: Iterable[tuple[bytes, bytes]]) -> None:
        """End the call with the front's status."""
        if self._phase is Phase.CLOSED:
            return
        if self._gone_status is None:
            if code == OK:
                code, text = UNAVAILABLE, NO_WAY_BACK
            await self._write(replies.ended_call(code, text, metadata))
            self._close()
            return
        self._ending = [*_status(code, text), *metadata]
        self._is_own_whole = True
        await self._give_gathered()
        await self._end_by_trailers()

    def over(self) -> None:
        if self._ending is None:  # else the engine's trailers are waited for
            super().over()

    async def _give_gathered(self) -> None:
        if self._is_own_whole and self._is_held and not self._has_given:
            self._has_given = True
            await self._write(replies.chunk(b"".join(self._own)))
            while self._held_chunks:
                self._held_chunks -= 1
                await self._write(replies.chunk(b""))

    async def _take_chunk(self, chunk: envoy.HttpBody) -> None:
        if self._mode == FULL_DUPLEX:
            await super()._take_chunk(chunk)
            return
        verdict = None if self._is_held else self._opening.take(chunk.body, chunk.end_of_stream)
        if verdict is Verdict.REPLACE and self._served:
            self._chunks.put_nowait((self._elsewhere_failed(self._served), True))
            self._served = ""
        else:
            self._chunks.put_nowait((chunk.body, chunk.end_of_stream))
        if verdict is None and self._has_given:
            await self._write(replies.chunk(b""))
        elif verdict is None:
            self._held_chunks += 1
        elif verdict is Verdict.REPLACE or (self._gathers and verdict is Verdict.ENOUGH):
            self._is_held = True  # what the front says takes its place
            await self._give_gathered()
        elif self._gathers:
            await self._write(replies.chunk(b""))
        else:
            self._has_given = self._has_given or verdict is Verdict.ENOUGH
            await self._give(verdict, chunk.body)
            if verdict is Verdict.ENOUGH:
                self._let_go()

    async def _take_trailers_of_answer(self, trailers: envoy.HttpTrailers) -> None:
        self._trailers.update((name, value.decode("latin-1")) for name, value in heads.pairs(trailers.trailers))
        self._trailers_have_come = True
        self._chunks.put_nowait((b"", True))
        await self._end_by_trailers()

    async def _end_by_trailers(self) -> None:
        """Let the trailers go once the engine's are here and the front's are known."""
        if not self._trailers_have_come or self._ending is None or self._phase is Phase.CLOSED:
            return
        is_lost = bool(self._own) and not self._has_given and self._mode != FULL_DUPLEX
        if is_lost:  # the engine has sent no message that ours could replace
            self._ending[:2] = _status(UNAVAILABLE, NO_WAY_BACK)
        await self._write(replies.trailers(self._ending, self._trailers.keys() - {STATUS, TEXT}))
        self._close()

    def _is_failure(self, message: envoy.ProcessingRequest) -> bool:
        status, headers = heads.answer_of(message)
        return status != HTTPStatus.OK or headers.get(STATUS, str(OK)) != str(OK)

    async def _answer_of(self, message: envoy.ProcessingRequest) -> Answer:
        status, headers = heads.answer_of(message)
        self._engines_own = heads.engines_own(headers)
        if self._is_local:
            raise heads.not_reached(message, status)
        if STATUS in headers or message.response_headers.end_of_stream or status != HTTPStatus.OK:
            # A status alone: it is held, since the request may be sent again.
            return Answer(status, headers, chunks_of(), is_unread=True)
        unseen = None
        if self._mode != FULL_DUPLEX:
            self._gathers = self._is_unary and self._mode != envoy.NONE
            self._gone_status = status
            if not self._gathers:
                unseen = self._watched
            await self._write(replies.head(None, self._told(self.head()), self._engines_own))
            if self._mode == envoy.NONE:
                self._let_go()
        return Answer(status, headers, self._read(), unseen=unseen, trailers=self._trailers)


async def _as_unary(stream: Answer) -> Answer:
    """Return the answer to a unary call that an engine got as a stream. An error is a status alone, as of unary calls.

    The engine says no status with an error. Requests that no model saw are refused without a model's name.
    """
    async for raw in messages_of(stream.chunks):
        message = wire.ModelStreamInferResponse.FromString(raw)
        response = message.infer_response
        if message.error_message:
            return _ended(INTERNAL if response.model_name else INVALID_ARGUMENT, message.error_message)
        if wire.FINAL in response.parameters:  # older servers do not tell
            if not wire.is_final(response.parameters):
                return _ended(UNIMPLEMENTED, SEVERAL)
            del response.parameters[wire.FINAL]
        return replace(stream, chunks=chunks_of(framed(response.SerializeToString())))
    return replace(stream, chunks=chunks_of())


def _ended(code: int, text: str) -> Answer:
    status = joined((name.decode(), value.decode("latin-1")) for name, value in _status(code, text))
    return Answer(HTTPStatus.OK, status, chunks_of(), is_unread=True)


def _status(code: int, text: str) -> list[tuple[bytes, bytes]]:
    return [(STATUS.encode(), str(code).encode()), (TEXT.encode(), heads.escaped(text))]
