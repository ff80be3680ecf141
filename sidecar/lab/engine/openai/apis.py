"""The other paths of vLLM's API: Responses and Messages where it generates; embeddings, scores, classes where it pools.

Conversations become chats. A pooling server has no real pooler here: its numbers are made of the tokens that the model
would answer, so that each adapter has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response

from sidecar.lab.engine.http.json_text import as_json
from sidecar.lab.engine.http.server import Endpoint
from sidecar.lab.engine.http.work import TextWork
from sidecar.lab.engine.openai.bodies import Bodies, ChatBodies, Json, Piece
from sidecar.lab.engine.openai.errors import invalid
from sidecar.lab.engine.openai.fields import read_fields, read_json
from sidecar.lab.engine.openai.request import chat_of, completion_of
from sidecar.lab.engine.openai.serving import Serving

DIMENSIONS = 8
"""Numbers of an embedding."""


def named(kind: str, record: Json) -> bytes:
    """Return an event that has a name."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), as_json(record))


class NamedBodies(ChatBodies):
    """Bodies whose stream has named events, and no other end."""

    done = b""

    def opening(self, works: Sequence[TextWork]) -> list[bytes]:
        return [named(kind, record) for kind, record in self.begin(works[0])]

    def chunk(self, piece: Piece, is_first: bool) -> bytes:
        events = [self.delta(piece)] if piece.tokens else []
        if piece.finish_reason is not None:
            events += self.finish(piece)
        return b"".join(named(kind, record) for kind, record in events)

    def usage(self, works: Sequence[TextWork]) -> bytes:
        return b""

    def begin(self, work: TextWork) -> list[tuple[str, Json]]:
        raise NotImplementedError

    def delta(self, piece: Piece) -> tuple[str, Json]:
        raise NotImplementedError

    def finish(self, piece: Piece) -> list[tuple[str, Json]]:
        raise NotImplementedError


class ResponsesBodies(NamedBodies):
    """The bodies of `/v1/responses`."""

    def begin(self, work: TextWork) -> list[tuple[str, Json]]:
        started = self._response(work, "in_progress", [], None)
        item = self._item("in_progress", [])
        return [
            ("response.created", self._event("response.created", 0, response=started)),
            ("response.in_progress", self._event("response.in_progress", 1, response=started)),
            ("response.output_item.added", self._event("response.output_item.added", 2, item=item, output_index=0)),
        ]

    def delta(self, piece: Piece) -> tuple[str, Json]:
        kind = "response.output_text.delta"
        place = {"content_index": 0, "output_index": 0, "item_id": self._item_id}
        return kind, self._event(kind, 2 + len(piece.work.tokens), delta=piece.text, logprobs=[], **place)

    def finish(self, piece: Piece) -> list[tuple[str, Json]]:
        kind = "response.incomplete" if piece.finish_reason == "length" else "response.completed"
        whole = self._ended(piece.work, piece.work.output.text, piece.finish_reason)
        return [(kind, self._event(kind, 3 + len(piece.work.tokens), response=whole))]

    def whole(self, works: Sequence[TextWork], pieces: Sequence[Piece]) -> bytes:
        return as_json(self._ended(works[0], pieces[0].text, pieces[0].finish_reason))

    @property
    def _item_id(self) -> str:
        return f"msg_{self.head.answer_id}"

    def _event(self, kind: str, number: int, **members: Any) -> Json:
        return members | {"sequence_number": number, "type": kind}

    def _item(self, status: str, content: list[Json]) -> Json:
        return {"id": self._item_id, "content": content, "role": "assistant", "status": status, "type": "message"}

    def _ended(self, work: TextWork, text: str, reason: str | None) -> Json:
        status = "incomplete" if reason == "length" else "completed"
        content: Json = {"annotations": [], "text": text, "type": "output_text", "logprobs": None}
        prompt, made = len(work.generation.tokens), len(work.tokens)
        usage = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": made,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + made,
        }
        return self._response(work, status, [self._item(status, [content])], usage)

    def _response(self, work: TextWork, status: str, output: list[Json], usage: Json | None) -> Json:
        return {
            "id": self.head.answer_id,
            "created_at": self.head.created,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": None,
            "metadata": None,
            "model": self.head.model,
            "object": "response",
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "background": False,
            "max_output_tokens": work.generation.max_new_tokens,
            "service_tier": "auto",
            "status": status,
            "text": None,
            "truncation": "disabled",
            "usage": usage,
            "user": None,
        }


class MessagesBodies(NamedBodies):
    """The bodies of `/v1/messages`."""

    STOPS: ClassVar = {"length": "max_tokens", "stop": "end_turn"}

    def begin(self, work: TextWork) -> list[tuple[str, Json]]:
        usage = {"input_tokens": len(work.generation.tokens), "output_tokens": 0}
        message = self._message([], None, usage)
        block = {"type": "content_block_start", "content_block": {"type": "text", "text": ""}, "index": 0}
        started = {"type": "message_start", "message": message}
        return [("message_start", started), ("content_block_start", block)]

    def delta(self, piece: Piece) -> tuple[str, Json]:
        kind = "content_block_delta"
        return kind, {"type": kind, "delta": {"type": "text_delta", "text": piece.text}, "index": 0}

    def finish(self, piece: Piece) -> list[tuple[str, Json]]:
        delta = {"stop_reason": self.STOPS.get(piece.finish_reason or ""), "stop_sequence": None}
        return [
            ("content_block_stop", {"type": "content_block_stop", "index": 0}),
            ("message_delta", {"type": "message_delta", "delta": delta, "usage": self._used(piece.work)}),
            ("message_stop", {"type": "message_stop"}),
        ]

    def whole(self, works: Sequence[TextWork], pieces: Sequence[Piece]) -> bytes:
        content = [{"type": "text", "text": pieces[0].text}]
        return as_json(self._message(content, self.STOPS.get(pieces[0].finish_reason or ""), self._used(works[0])))

    def _used(self, work: TextWork) -> Json:
        return {"input_tokens": len(work.generation.tokens), "output_tokens": len(work.tokens)}

    def _message(self, content: list[Json], stop: str | None, usage: Json) -> Json:
        head = self.head
        return {
            "id": head.answer_id, "type": "message", "role": "assistant", "content": content, "model": head.model,
            "stop_reason": stop, "stop_sequence": None, "usage": usage,
        }  # fmt: skip


class PooledBodies(Bodies):
    """The bodies of a pooling server; `form` is the object that the path makes of numbers."""

    def __init__(self, head: Any, form: str) -> None:
        super().__init__(head)
        self._form = form

    def choice(self, piece: Piece, is_first: bool) -> Json:
        raise NotImplementedError

    def whole(self, works: Sequence[TextWork], pieces: Sequence[Piece]) -> bytes:
        prompt = sum(len(work.generation.tokens) for work in works)
        usage: Json = {"prompt_tokens": prompt, "total_tokens": prompt}
        data = [self._datum(number, _numbers(piece)) for number, piece in enumerate(pieces)]
        head = {"id": self.head.answer_id, "model": self.head.model}
        if self._form == "rerank":
            ranked = sorted(data, key=lambda each: each["relevance_score"], reverse=True)
            return as_json(head | {"usage": usage, "results": ranked})
        usage |= {"completion_tokens": 0, "prompt_tokens_details": None}
        return as_json(head | {"object": "list", "created": self.head.created, "data": data, "usage": usage})

    def _datum(self, number: int, numbers: list[float]) -> Json:
        first = numbers[0]
        forms: dict[str, Json] = {
            "embedding": {"object": "embedding", "embedding": numbers},
            "pooling": {"object": "pooling", "data": numbers},
            "score": {"object": "score", "score": first},
            "rerank": {"document": {"text": None}, "relevance_score": first},
            "classify": {"label": "LABEL_0", "probs": [first, 1 - first], "num_classes": 2},
        }
        return {"index": number} | forms[self._form]


def _numbers(piece: Piece) -> list[float]:
    return [(token + 1) / 100_003 for token in piece.work.tokens]


class Apis:
    """The endpoints, by the server's generation."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def generating(self) -> dict[str, Endpoint]:
        return {"/v1/responses": self._respond, "/v1/messages": self._message}

    def pooling(self) -> dict[str, Endpoint]:
        return {
            "/v1/embeddings": self._pooled("embd", "embedding"),
            "/pooling": self._pooled("pool", "pooling"),
            "/classify": self._pooled("classify", "classify"),
            "/v1/score": self._pooled("score", "score"),
            "/v1/rerank": self._pooled("rerank", "rerank"),
        }

    async def _respond(self, request: Request) -> Response:
        content = _object(read_json(request.headers.get("content-type", ""), await request.body()))
        asked = content.get("input")
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        if content.get("instructions"):
            messages = [{"role": "system", "content": content["instructions"]}, *(messages or ())]
        chat = content | {"messages": messages, "max_tokens": content.get("max_output_tokens"), "tools": None}
        return await self._chat(request, chat, "resp", ResponsesBodies)

    async def _message(self, request: Request) -> Response:
        content = _object(read_json(request.headers.get("content-type", ""), await request.body()))
        chat = content | {"tools": None, "stop": content.get("stop_sequences")}
        return await self._chat(request, chat, "chatcmpl", MessagesBodies)

    async def _chat(self, request: Request, content: Json, prefix: str, bodies: type[NamedBodies]) -> Response:
        serving = self._serving
        fields = read_fields(serving.chat_fields, content)
        copy = await serving.find(fields)
        asked = chat_of(fields, serving.spec)
        return await serving.answer(request, fields, asked, copy, bodies(serving.head(prefix, request, fields)))

    def _pooled(self, prefix: str, form: str) -> Endpoint:
        async def pool(request: Request) -> Response:
            serving = self._serving
            content = _object(read_json(request.headers.get("content-type", ""), await request.body()))
            made = {"model": content.get("model"), "max_tokens": DIMENSIONS, "temperature": 0, "ignore_eos": True}
            fields = read_fields(serving.completion_fields, made | {"prompt": _prompts(content)})
            copy = await serving.find(fields)
            asked = completion_of(fields, serving.spec)
            return await serving.answer(
                request, fields, asked, copy, PooledBodies(serving.head(prefix, request, fields), form)
            )

        return pool


def _object(content: Any) -> Json:
    if not isinstance(content, dict):
        raise invalid("Input should be a valid dictionary", "body")
    return content


def _prompts(content: Json) -> Any:
    """Return the inputs, or the pairs of a query and a document."""
    if content.get("input"):
        return content["input"]
    firsts = _list(content, "query", "queries", "text_1", "data_1")
    seconds = _list(content, "documents", "items", "text_2", "data_2")
    if len(firsts) not in (1, len(seconds)):
        raise invalid("Input lengths must be either 1:1, 1:N or N:N", "queries")
    return [f"{first}\n{second}" for first, second in zip(firsts * len(seconds), seconds, strict=False)]


def _list(content: Json, *names: str) -> list[str]:
    found = next((content[name] for name in names if content.get(name)), None)
    if found is None:
        raise invalid("At least one text element must be given", names[0])
    return [found] if isinstance(found, str) else list(map(str, found))
