"""The bodies of answers, whole and in events, key by key as trtllm-serve's postprocessors write them.

A completion's events have all keys; a chat's leave out those without a value, but its event of token counts does not.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sidecar.lab.engine.http.json_text import as_json, event
from sidecar.lab.engine.http.work import Token
from sidecar.lab.engine.trtllm.work import TorchWork

Json = dict[str, Any]
DECODED = 1.0
"""Tokens of a sequence in one iteration, without speculation."""


@dataclass(frozen=True)
class Form:
    """How one request wants to be answered. `model` is the request's own string; a merged answer has the server's."""

    model: str
    server_model: str
    role: str
    n: int
    detokenizes: bool
    shows_usage: bool
    shows_usage_always: bool
    numbers_ids: bool


class Bodies(ABC):
    """Writes the bodies of one answer. `number` is the request's number in the server, of its first prompt."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, form: Form) -> None:
        self.form = form
        self._created = int(time.time())
        self._shared_id: str | None = None

    def begin(self, works: Sequence[TorchWork]) -> None:
        """Note the sequences of the answer, which name its stream."""
        if self.form.numbers_ids:
            prompts = {work.batch_row for work in works}
            number = str(works[0].request_id) if len(prompts) == 1 else uuid.uuid4().hex
            self._shared_id = f"{self.prefix}-{number}"

    @abstractmethod
    def whole(self, works: Sequence[TorchWork], last: dict[int, Token], echoes: Sequence[str]) -> bytes:
        """Return an answer that is not streamed; `last` has the last token of each sequence by place."""

    @abstractmethod
    def events(self, token: Token, is_first: bool, echo: str) -> list[bytes]:
        """Return the events of a token; `is_first` if it is its prompt's first."""

    def usage_event(self, works: Sequence[TorchWork]) -> bytes:
        """Return the event of token counts that ends a prompt's part of the stream."""
        return event(self._chunk([]) | {"usage": _usage(works)})

    def _chunk(self, choices: list[Json]) -> Json:
        return {
            "id": self._shared_id or self._fresh_id(),
            "object": self.chunk_kind,
            "created": self._created,
            "model": self.form.model,
            "choices": choices,
        }

    def _fresh_id(self) -> str:
        return f"{self.prefix}-{uuid.uuid4().hex}"

    def _whole(self, choices: list[Json], works: Sequence[TorchWork]) -> Json:
        is_merged = len({work.batch_row for work in works}) > 1
        return {
            "id": self._fresh_id(),
            "object": self.kind,
            "created": self._created,
            "model": self.form.server_model if is_merged else self.form.model,
            "choices": choices,
            "usage": _usage(works),
            "prompt_token_ids": [] if is_merged else None,
        }


class CompletionBodies(Bodies):
    """The bodies of `/v1/completions`."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def whole(self, works: Sequence[TorchWork], last: dict[int, Token], echoes: Sequence[str]) -> bytes:
        shows = self.form.detokenizes
        choices = [
            {
                "index": work.place,
                "text": echoes[work.batch_row] + work.output.text if shows else "",
                "token_ids": None if shows else work.tokens,
                "logprobs": None,
                "context_logits": None,
                "finish_reason": last[work.place].finish_reason,
                "stop_reason": last[work.place].stop_reason,
                "disaggregated_params": None,
                "avg_decoded_tokens_per_iter": DECODED,
            }
            for work in works
        ]
        return as_json(self._whole(choices, works))

    def events(self, token: Token, is_first: bool, echo: str) -> list[bytes]:
        shows = self.form.detokenizes
        text = echo + token.text if is_first else token.text
        choice: Json = {
            "index": token.place,
            "text": text if shows else "",
            "token_ids": None if shows else [token.token],
            "logprobs": None,
            "finish_reason": token.finish_reason,
            "stop_reason": token.stop_reason,
            "avg_decoded_tokens_per_iter": DECODED,
        }
        return [event(self._chunk([choice]) | {"usage": _running(token) if self.form.shows_usage_always else None})]


class ChatBodies(Bodies):
    """The bodies of `/v1/chat/completions`."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def whole(self, works: Sequence[TorchWork], last: dict[int, Token], echoes: Sequence[str]) -> bytes:
        choices: list[Json] = [
            {
                "index": work.place,
                "message": {
                    "role": self.form.role,
                    "content": work.output.text,
                    "reasoning_content": "",
                    "reasoning": None,
                    "tool_calls": [],
                },
                "logprobs": None,
                "finish_reason": last[work.place].finish_reason,
                "stop_reason": last[work.place].stop_reason,
                "mm_embedding_handle": None,
                "disaggregated_params": None,
                "avg_decoded_tokens_per_iter": DECODED,
            }
            for work in works
        ]
        body = self._whole(choices, works)
        return as_json(body | {"prompt_token_ids_b64": None} if self.form.numbers_ids else body)

    def events(self, token: Token, is_first: bool, echo: str) -> list[bytes]:
        opening = self._opening(token) if is_first else []
        choice: Json = {"index": token.place, "delta": {"content": token.text, "reasoning_content": ""}}
        if token.finish_reason is not None:
            choice["finish_reason"] = token.finish_reason
        if token.stop_reason is not None:
            choice["stop_reason"] = token.stop_reason
        chunk = self._chunk([choice | {"avg_decoded_tokens_per_iter": DECODED}])
        return [*opening, event(chunk | {"usage": _running(token)} if self.form.shows_usage_always else chunk)]

    def _opening(self, token: Token) -> list[bytes]:
        """Return an event with the role for each answer; a space comes before its end."""
        usage = {}
        if self.form.shows_usage_always:
            usage = {"usage": _counts(len(token.sequence.generation.tokens), 0)}
        chunks = (
            self._chunk([{"index": place, "delta": {"role": self.form.role}}]) | usage for place in range(self.form.n)
        )
        return [b"data: " + as_json(chunk) + b" \n\n" for chunk in chunks]


def _running(token: Token) -> Json:
    work = token.sequence
    return _counts(len(work.generation.tokens), work.sent)


def _usage(works: Sequence[TorchWork]) -> Json:
    """Return the counts of an answer, each prompt counted once whatever its number of answers."""
    prompts = {work.batch_row: len(work.generation.tokens) for work in works}
    return _counts(sum(prompts.values()), sum(len(work.tokens) for work in works))


def _counts(prompt: int, tokens: int) -> Json:
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + tokens,
        "completion_tokens": tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
