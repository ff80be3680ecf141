"""The bodies of answers, whole and in chunks, key by key as vLLM 0.32.0 and 0.33.0 write them.

Chunks leave out keys that were never set, so an unknown value is null in some and missing in others; which of them a
client's parser meets depends on the position in the stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sidecar.lab.engine.http.json_text import DONE, as_json, event
from sidecar.lab.engine.http.template import ASSISTANT
from sidecar.lab.engine.http.work import TextWork

Json = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """The news of one sequence: tokens since the last time, their text, and how it ended if it did."""

    work: TextWork
    tokens: list[int]
    text: str
    finish_reason: str | None
    stop_reason: str | int | None


@dataclass(frozen=True)
class Head:
    """What all bodies of one answer share, and which optional parts they show; `role` is the speaker in a chat.

    Those of 0.32, which `is_older`, lack a key that 0.33 has.
    """

    answer_id: str
    created: int
    model: str
    fingerprint: str
    shows_ids: bool
    shows_usage: bool = False
    shows_usage_always: bool = False
    is_older: bool = True
    role: str = ASSISTANT

    @property
    def newer(self) -> Json:
        """What a choice has from 0.33 on; a chat's in a stream when it ends."""
        return {} if self.is_older else {"weight_versions": None}


class Bodies(ABC):
    """Writes the bodies of one answer."""

    kind: str
    chunk_kind: str
    done = DONE
    """What ends a stream."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def opening(self, works: Sequence[TextWork]) -> list[bytes]:
        """Return the chunks that precede the first token's chunk."""
        return []

    @abstractmethod
    def whole(self, works: Sequence[TextWork], pieces: Sequence[Piece]) -> bytes:
        """Return an answer that is not streamed."""

    @abstractmethod
    def choice(self, piece: Piece, is_first: bool) -> Json:
        """Return a chunk's only choice."""

    def chunk(self, piece: Piece, is_first: bool) -> bytes:
        """Return the chunk of a sequence's news; `is_first` if nothing of it was sent before."""
        chunk = self._chunk([self.choice(piece, is_first)])
        if self.head.shows_usage_always:
            chunk["usage"] = self._running_usage(len(piece.work.generation.tokens), piece.work.sent)
        if piece.finish_reason is not None and not self.head.shows_usage:
            chunk["system_fingerprint"] = self.head.fingerprint
        if not self.head.is_older:
            chunk["kv_transfer_params"] = None
        return event(chunk)

    def usage(self, works: Sequence[TextWork]) -> bytes:
        """Return the chunk of token counts that ends a stream if the client asked for it."""
        tokens = sum(len(work.tokens) for work in works)
        chunk = self._chunk([]) | {"usage": usage_of(_prompt_tokens(works), tokens)}
        return event(chunk | {"system_fingerprint": self.head.fingerprint})

    def _chunk(self, choices: list[Json]) -> Json:
        head = self.head
        return {
            "id": head.answer_id,
            "object": self.chunk_kind,
            "created": head.created,
            "model": head.model,
            "choices": choices,
        }

    def _running_usage(self, prompt: int, tokens: int) -> Json:
        return usage_of(prompt, tokens)

    def _whole(self, choices: list[Json], works: Sequence[TextWork], extra: Json) -> bytes:
        tokens = sum(len(work.tokens) for work in works)
        details = {"prompt_tokens_details": None, "completion_tokens_details": None}
        body = self._chunk(choices) | {
            "object": self.kind,
            "service_tier": None,
            "system_fingerprint": self.head.fingerprint,
            "usage": usage_of(_prompt_tokens(works), tokens) | details,
        }
        body |= extra
        return as_json(body | {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None})


class CompletionBodies(Bodies):
    """The bodies of `/v1/completions`."""

    kind = chunk_kind = "text_completion"

    def whole(self, works: Sequence[TextWork], pieces: Sequence[Piece]) -> bytes:
        shown = self.head.shows_ids
        choices = [
            {
                "index": piece.work.place,
                "text": piece.text,
                "logprobs": None,
                "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
                "token_ids": piece.tokens if shown else None,
                "prompt_logprobs": None,
                "prompt_token_ids": piece.work.generation.tokens if shown else None,
                "routed_experts": None,
                **self.head.newer,
            }
            for piece in pieces
        ]
        return self._whole(choices, works, {})

    def choice(self, piece: Piece, is_first: bool) -> Json:
        shown = self.head.shows_ids
        return {
            "index": piece.work.place,
            "text": piece.text,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            "prompt_token_ids": piece.work.generation.tokens if shown and is_first else None,
            "token_ids": piece.tokens if shown else None,
            **self.head.newer,
        }


class ChatBodies(Bodies):
    """The bodies of `/v1/chat/completions`."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self, works: Sequence[TextWork]) -> list[bytes]:
        prompt = works[0].generation.tokens
        rest: Json = {"prompt_token_ids": prompt if self.head.shows_ids else None, "prompt_text": None}
        if self.head.shows_usage_always:
            rest = {"usage": self._running_usage(len(prompt), 0)} | rest
        delta = {"role": self.head.role, "content": ""}
        choices = ({"index": work.place, "delta": delta, "logprobs": None, "finish_reason": None} for work in works)
        return [event(self._chunk([choice]) | rest) for choice in choices]

    def whole(self, works: Sequence[TextWork], pieces: Sequence[Piece]) -> bytes:
        shown = self.head.shows_ids
        nothing = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
        choices = [
            {
                "index": piece.work.place,
                "message": {"role": self.head.role, "content": piece.text, **nothing},
                "logprobs": None,
                "finish_reason": piece.finish_reason,
                "stop_reason": piece.stop_reason,
                "token_ids": piece.tokens if shown else None,
                "routed_experts": None,
                **self.head.newer,
            }
            for piece in pieces
        ]
        prompt = works[0].generation.tokens if shown else None
        return self._whole(choices, works, {"prompt_logprobs": None, "prompt_token_ids": prompt, "prompt_text": None})

    def choice(self, piece: Piece, is_first: bool) -> Json:
        choice: Json = {
            "index": piece.work.place,
            "delta": {"content": piece.text},
            "logprobs": None,
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        ids = {"token_ids": piece.tokens if self.head.shows_ids else None}
        return choice | ids | (self.head.newer if piece.finish_reason is not None else {})

    def _running_usage(self, prompt: int, tokens: int) -> Json:
        return usage_of(prompt, tokens) | {"completion_tokens_details": None}


def usage_of(prompt: int, tokens: int) -> Json:
    """Return the token counts of an answer."""
    return {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens}


def _prompt_tokens(works: Sequence[TextWork]) -> int:
    """Return the tokens of all prompts, each counted once whatever its number of answers."""
    return sum({work.batch_row: len(work.generation.tokens) for work in works}.values())
