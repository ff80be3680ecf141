"""Generation over HTTP: a request's sequences go to the engine, and their progress goes to the client.

When a client leaves, its sequences are cancelled. The engine's death is a 500 before an answer has begun, and an event
of the stream afterwards.

The bodies of answers as vLLM 0.33.0's Rust front end writes them.

Chunks have no key without a value. The end of a choice is an event of its own, and so is the begin of a chat.
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

from sidecar.lab.engine.http.json_text import as_json, event
from sidecar.lab.engine.http.leaving import LEFT, Streamed, unless_left
from sidecar.lab.engine.http.work import TextWork, Token
from sidecar.lab.engine.kserve.errors import BackendError
from sidecar.lab.engine.kserve.generation import Generation, LoraTensors
from sidecar.lab.engine.kserve.work import Progress
from sidecar.lab.engine.openai.adapters import Adapters, Copy
from sidecar.lab.engine.openai.bodies import Bodies, ChatBodies, CompletionBodies, Head, Json, Piece, usage_of
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
from sidecar.lab.engine.openai.work import SequenceWork, load_call
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.vllm import ENGINE_DIED

_NOTHING = {"prompt_tokens_details": None, "completion_tokens_details": {"reasoning_tokens": 0}}
_LAST = {"kv_transfer_params": None, "ec_transfer_params": None}


class _RustBodies(Bodies):
    """What completions and chats share."""

    def chunk(self, piece: Piece, is_first: bool) -> bytes:
        """Return the event of a sequence's news, if it has any, and that of its end."""
        written = b""
        if self._has_news(piece):
            written = self._event(self.choice(piece, is_first), piece.work)
        if piece.finish_reason is not None:
            written += self._event(self._end(piece), piece.work)
        return written

    def usage(self, works: Sequence[TextWork]) -> bytes:
        return event(self._chunk([]) | {"usage": self._usage(works[0], len(works[0].tokens))})

    def _has_news(self, piece: Piece) -> bool:
        return bool(piece.tokens)

    def _end(self, piece: Piece) -> Json:
        raise NotImplementedError

    def _event(self, choice: Json, work: TextWork, **more: object) -> bytes:
        chunk = self._chunk([choice]) | more
        if self.head.shows_usage_always:
            chunk["usage"] = self._usage(work, work.sent)
        return event(chunk)

    def _usage(self, work: TextWork, tokens: int) -> Json:
        return usage_of(len(work.generation.tokens), tokens) | _NOTHING

    def _reasons(self, piece: Piece) -> Json:
        reasons: Json = {"finish_reason": piece.finish_reason}
        return reasons if piece.stop_reason is None else reasons | {"stop_reason": piece.stop_reason}


class RustCompletionBodies(_RustBodies, CompletionBodies):
    """The bodies of `/v1/completions`."""

    def opening(self, works: Sequence[TextWork]) -> list[bytes]:
        if not self.head.shows_ids:
            return []
        prompt = works[0].generation.tokens
        return [self._event({"index": 0, "text": "", "token_ids": [], "prompt_token_ids": prompt}, works[0])]

    def choice(self, piece: Piece, is_first: bool) -> Json:
        return {"index": 0, "text": piece.text} | ({"token_ids": piece.tokens} if self.head.shows_ids else {})

    def whole(self, works: Sequence[TextWork], pieces: Sequence[Piece]) -> bytes:
        (piece,), shown = pieces, self.head.shows_ids
        choice = {
            "index": 0,
            "text": piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            "prompt_logprobs": None,
            "token_ids": piece.tokens if shown else None,
            "prompt_token_ids": piece.work.generation.tokens if shown else None,
        }
        body = self._chunk([choice]) | {"usage": self._usage(piece.work, len(piece.work.tokens))}
        return as_json(body | {"metrics": None, "system_fingerprint": None} | _LAST)

    def _end(self, piece: Piece) -> Json:
        ids: Json = {"token_ids": []} if self.head.shows_ids else {}
        return {"index": 0, "text": ""} | self._reasons(piece) | ids


class RustChatBodies(_RustBodies, ChatBodies):
    """The bodies of `/v1/chat/completions`."""

    def opening(self, works: Sequence[TextWork]) -> list[bytes]:
        ids = {"prompt_token_ids": works[0].generation.tokens} if self.head.shows_ids else {}
        return [self._event({"index": 0, "delta": {"role": self.head.role}}, works[0], **ids)]

    def choice(self, piece: Piece, is_first: bool) -> Json:
        ids = {"token_ids": piece.tokens} if self.head.shows_ids else {}
        return {"index": 0, "delta": {"content": piece.text}} | ids

    def whole(self, works: Sequence[TextWork], pieces: Sequence[Piece]) -> bytes:
        (piece,), shown = pieces, self.head.shows_ids
        nothing = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
        choice = {
            "index": 0,
            "message": {"role": self.head.role, "content": piece.text or None, **nothing},
            "logprobs": None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            "token_ids": piece.tokens if shown else None,
            "routed_experts": None,
            "weight_versions": None,
        }
        body = self._chunk([choice]) | {"object": self.kind, "service_tier": None}
        body |= {"usage": self._usage(piece.work, len(piece.work.tokens)), "metrics": None, "system_fingerprint": None}
        body |= {"prompt_logprobs": None, "prompt_token_ids": piece.work.generation.tokens if shown else None}
        return as_json(body | {"prompt_text": None} | _LAST)

    def _has_news(self, piece: Piece) -> bool:
        return bool(piece.text)

    def _end(self, piece: Piece) -> Json:
        return {"index": 0, "delta": {}} | self._reasons(piece)


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

    completion_fields, chat_fields = CompletionFields, ChatFields

    @property
    def spec(self) -> EngineSpec:
        return self._driver.engine.spec

    async def complete(self, request: Request) -> Response:
        """`POST /v1/completions`. Raises ApiError."""
        content = read_json(request.headers.get("content-type", ""), await request.body())
        check_completion_body(content)
        fields = read_fields(self.completion_fields, content)
        copy = await self.find(fields)
        if self._is_rust:
            check_request(fields)
        asked = completion_of(fields, self._driver.engine.spec)
        bodies = self._bodies()[0](self.head("cmpl", request, fields))
        return await self.answer(request, fields, asked, copy, bodies)

    def _bodies(self) -> tuple[type[Bodies], type[Bodies]]:
        """Return the bodies of completions and of chats."""
        return (RustCompletionBodies, RustChatBodies) if self._is_rust else (CompletionBodies, ChatBodies)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`. Raises ApiError."""
        content = read_json(request.headers.get("content-type", ""), await request.body())
        check_stream_options(content)
        fields = read_fields(self.chat_fields, content)
        copy = await self.find(fields)
        if self._is_rust:
            check_request(fields)
        asked = chat_of(fields, self._driver.engine.spec)
        head = self.head("chatcmpl", request, fields)
        # Without a generation prompt the answer continues the last message.
        role = head.role if fields.add_generation_prompt else fields.messages[-1].role
        return await self.answer(request, fields, asked, copy, self._bodies()[1](replace(head, role=role)))

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

    async def find(self, fields: Sampling) -> Copy | None:
        copy = self.adapters.find(fields.model)
        if self._driver.is_dead:
            raise self._dead(SUBMITTING)
        return copy

    def head(self, prefix: str, request: Request, fields: Sampling) -> Head:
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

    async def answer(
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
        yield bodies.done

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
