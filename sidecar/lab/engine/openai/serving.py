"""Generation over HTTP: a request's sequences go to the engine, and their progress goes to the client.

When a client leaves, its sequences are cancelled. The engine's death is a 500 before an answer has begun, and an event
of the stream afterwards.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from starlette.requests import Request
from starlette.responses import Response

from sidecar.lab.engine.http.json_text import DONE
from sidecar.lab.engine.http.leaving import LEFT, Streamed, unless_left
from sidecar.lab.engine.http.work import Token
from sidecar.lab.engine.kserve.errors import BackendError
from sidecar.lab.engine.kserve.generation import Generation, LoraTensors
from sidecar.lab.engine.kserve.work import Progress
from sidecar.lab.engine.openai.adapters import Adapters, Copy
from sidecar.lab.engine.openai.bodies import Bodies, ChatBodies, CompletionBodies, Head, Piece
from sidecar.lab.engine.openai.errors import ApiError, EngineDead, internal
from sidecar.lab.engine.openai.fields import ChatFields, CompletionFields, Sampling, read_fields, read_json
from sidecar.lab.engine.openai.loop import VllmDriver
from sidecar.lab.engine.openai.options import VllmOptions
from sidecar.lab.engine.openai.request import (
    EngineRequest,
    chat_of,
    check_completion_body,
    check_stream_options,
    completion_of,
)
from sidecar.lab.engine.openai.rust import CHATTING, COMPLETING, SUBMITTING, check_request
from sidecar.lab.engine.openai.rust_bodies import RustChatBodies, RustCompletionBodies
from sidecar.lab.engine.openai.work import SequenceWork, load_call
from sidecar.lab.engine.vllm import ENGINE_DIED

DIED = "The server had an error while processing your request."
"""What the Python server tells its clients of a dead engine from 0.33 on; 0.32 passes the engine's own words on."""


class Serving:
    """Answers generation requests with one engine."""

    def __init__(self, driver: VllmDriver, options: VllmOptions, fingerprint: str) -> None:
        self.adapters: Adapters
        self._driver = driver
        self._options = options
        self._fingerprint = fingerprint
        self._is_rust = options.rust_frontend
        self._numbers = itertools.count(1)

    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`. Raises ApiError."""
        content = read_json(request.headers.get("content-type", ""), await request.body())
        check_completion_body(content)
        fields = read_fields(CompletionFields, content)
        copy = self._find(fields)
        if self._is_rust:
            check_request(fields)
        asked = completion_of(fields, self._driver.engine.spec)
        bodies = RustCompletionBodies if self._is_rust else CompletionBodies
        return await self._answer(request, fields, asked, copy, bodies(self._head("cmpl", request, fields)))

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`. Raises ApiError."""
        content = read_json(request.headers.get("content-type", ""), await request.body())
        check_stream_options(content)
        fields = read_fields(ChatFields, content)
        copy = self._find(fields)
        if self._is_rust:
            check_request(fields)
        asked = chat_of(fields, self._driver.engine.spec)
        head = self._head("chatcmpl", request, fields)
        # Without a generation prompt the answer continues the last message.
        role = head.role if fields.add_generation_prompt else fields.messages[-1].role
        bodies = RustChatBodies if self._is_rust else ChatBodies
        return await self._answer(request, fields, asked, copy, bodies(replace(head, role=role)))

    async def put(self, copy: Copy) -> None:
        """Bring an adapter to the engine. Raises ApiError if the engine refuses it."""
        ended: asyncio.Queue[Progress] = asyncio.Queue()
        await self._submit([load_call(next(self._numbers), copy, ended.put_nowait)])
        progress = await ended.get()
        if progress.error is not None:
            raise self._dead(SUBMITTING) if progress.error == ENGINE_DIED else internal(progress.error)

    async def remove(self, copy: Copy) -> bool:
        """Have the engine remove an adapter; return False if it has it no more. Raises ApiError."""
        try:
            return await self._driver.remove(copy.number)
        except BackendError as error:
            raise self._dead(SUBMITTING) from error

    def _dead(self, before: str) -> EngineDead:
        """Return the error for a dead engine; `before` is what the Rust front end puts before its words for that."""
        if self._is_rust:
            return EngineDead(f"{before}engine-core error: engine core reported fatal failure")
        return EngineDead(ENGINE_DIED if self._options.is_older else DIED)

    def _find(self, fields: Sampling) -> Copy | None:
        copy = self.adapters.find(fields.model)
        if self._driver.is_dead:
            raise self._dead(SUBMITTING)
        return copy

    def _head(self, prefix: str, request: Request, fields: Sampling) -> Head:
        own_id = request.headers.get("x-request-id") or fields.request_id or uuid.uuid4().hex[:16]
        options = fields.stream_options
        usage = bool(options and options.include_usage)
        return Head(
            answer_id=f"{prefix}-{own_id}",
            created=int(time.time()),
            model=fields.model if fields.model in self.adapters.copies and fields.model else self._options.names[0],
            fingerprint=self._fingerprint,
            shows_ids=bool(fields.return_token_ids),
            shows_usage=usage,
            shows_usage_always=usage and bool(options and options.continuous_usage_stats),
            is_older=self._options.is_older,
        )

    async def _answer(
        self, request: Request, fields: Sampling, asked: EngineRequest, copy: Copy | None, bodies: Bodies
    ) -> Response:
        progress: asyncio.Queue[Progress] = asyncio.Queue()
        works = self._works(asked, copy, bodies.head, progress)
        if asked.fault is not None and (self._is_rust or not fields.stream):
            raise asked.fault
        if fields.stream:
            stream = self._stream(works, progress, bodies, asked.fault)
            return Streamed(stream, media_type="text/event-stream")
        return await unless_left(request.receive, self._whole(works, progress, bodies)) or LEFT

    def _works(
        self, asked: EngineRequest, copy: Copy | None, head: Head, progress: asyncio.Queue[Progress]
    ) -> list[SequenceWork]:
        lora = None if copy is None else LoraTensors(copy.number, None, None)
        return [
            SequenceWork(
                request_id=next(self._numbers),
                triton_id=head.answer_id,
                model=head.model,
                generation=Generation(prompt, limit, asked.stops.end_id, lora),
                parameters={} if copy is None else {"lora_name": copy.name},
                sink=progress.put_nowait,
                batch_row=row,
                copy=copy,
                stops=asked.stops,
                bias=asked.bias,
                place=row * asked.n + number,
            )
            for row, (prompt, limit) in enumerate(zip(asked.prompts, asked.max_tokens, strict=True))
            for number in range(asked.n)
        ]

    async def _whole(
        self, works: Sequence[SequenceWork], progress: asyncio.Queue[Progress], bodies: Bodies
    ) -> Response:
        last: dict[int, Piece] = {}
        try:
            async with aclosing(self._pieces(works, progress)) as pieces:
                async for piece in pieces:
                    last[piece.work.place] = piece
        except EngineDead as error:
            raise self._dead(CHATTING if isinstance(bodies, ChatBodies) else COMPLETING) from error
        ended = [last[work.place] for work in works]
        whole = [Piece(p.work, p.work.tokens, p.work.output.text, p.finish_reason, p.stop_reason) for p in ended]
        return Response(bodies.whole(works, whole), media_type="application/json")

    async def _stream(
        self, works: Sequence[SequenceWork], progress: asyncio.Queue[Progress], bodies: Bodies, fault: ApiError | None
    ) -> AsyncGenerator[bytes]:
        begun: set[int] = set()
        try:
            if fault is not None:
                raise fault
            async with aclosing(self._pieces(works, progress)) as pieces:
                async for piece in pieces:
                    if not begun:
                        for chunk in bodies.opening(works):
                            yield chunk
                    yield bodies.chunk(piece, piece.work.place not in begun)
                    begun.add(piece.work.place)
            if bodies.head.shows_usage:
                yield bodies.usage(works)
        except ApiError as error:
            yield error.event
        yield DONE

    async def _pieces(self, works: Sequence[SequenceWork], progress: asyncio.Queue[Progress]) -> AsyncGenerator[Piece]:
        """Yield the sequences' news until all have ended.

        Raises ApiError if the engine dies. Closing this cancels the sequences.
        """
        try:
            await self._submit(works)
            left = len(works)
            held: dict[int, list[Token]] = {}
            while left:
                token = self._good(await progress.get())
                tokens = held.setdefault(token.place, [])
                tokens.append(token)
                is_first = not token.sequence.sent
                if token.final or is_first or len(tokens) >= self._options.stream_interval:
                    left -= token.final
                    yield _piece(held.pop(token.place))
        finally:
            self._driver.cancel([work.request_id for work in works if not work.ended])

    async def _submit(self, works: Sequence[SequenceWork]) -> None:
        try:
            await asyncio.gather(*map(self._driver.submit, works))
        except BackendError as error:
            raise self._dead(SUBMITTING) from error

    def _good(self, progress: Progress) -> Token:
        """Return a token. Raises ApiError for a failed sequence."""
        if progress.error is not None:
            raise self._dead("") if progress.error == ENGINE_DIED else internal(progress.error)
        assert isinstance(progress, Token)
        return progress


def _piece(tokens: Sequence[Token]) -> Piece:
    """Join tokens of one sequence that are sent together."""
    last = tokens[-1]
    work = last.sequence
    work.sent += len(tokens)
    ids = [token.token for token in tokens if token.token is not None]
    return Piece(work, ids, "".join(token.text for token in tokens), last.finish_reason, last.stop_reason)
