"""Write an engine's text in the form of completions and chats: chunks as they come, or one object at the end.

Such engines do not report how an answer ended: by its length if it has as many tokens as were allowed. Nor do they
count tokens: an answer's are counted as they come, a prompt's by its tokenizer. Where neither can be, the usage has an
estimate and says so, since clients add up and bill whole numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from time import time
from typing import Any
from uuid import uuid4

from sidecar.backends.api import Reply
from sidecar.backends.kind import Piece, Reader
from sidecar.fronts.openai.request import OpenAiRequest
from sidecar.fronts.openai.text_forms import TextRequest

DONE = b"data: [DONE]\n\n"
LOG_PROB_MIN = -9999.0
"""What vLLM tells for an impossible token, since JSON has no infinity."""
TOKEN_BYTES = 4
"""Bytes of text that are estimated to be one token, as OpenAI's rule of thumb for English has it."""


class TextAnswer:
    """One answer. With `counts` each reply is one token. The engine's context has `context` tokens if that is less."""

    def __init__(
        self, asked: OpenAiRequest, text: TextRequest, counts: bool, reader: Reader, context: int | None = None
    ) -> None:
        self._context = context
        self._asked = asked
        self._text = text
        self._counts = counts
        self._reader = reader
        self._stop = StopWords(text.stop)
        self._tokens = self._bytes = 0
        self._chosen = ChosenTokens(asked.is_chat) if text.logprobs else None
        self._pieces: list[str] = []
        self.ended = False
        self._id = f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{uuid4().hex}"
        self._created = int(time())
        self._before, self._after = self._around()
        self._has_begun = False

    def take(self, reply: Reply) -> bytes:
        """Return what a reply adds to the response: events of a stream, else nothing until the end."""
        piece = self._reader.read(reply)
        self._tokens += piece.tokens
        self._counts = self._counts or piece.is_told
        text = self._stop.pass_on(piece.text, reply.final)
        self._bytes += len(text.encode())
        self.ended = reply.final or self._stop.found
        if self._chosen is not None:
            self._chosen.add(piece, len(text))
        if self._asked.streams:
            return self._events(text)
        self._pieces.append(text)
        return b""

    def end(self, prompt_tokens: int | None) -> bytes:
        """Return the end of a stream, or the whole object. `prompt_tokens` is None if nothing has counted them."""
        return self._last_events(prompt_tokens) if self._asked.streams else self._whole(prompt_tokens)

    def _reason(self, prompt_tokens: int | None) -> str:
        is_full = self._context is not None and self._tokens + (prompt_tokens or 0) >= self._context
        by_length = self._counts and not self._stop.found and (is_full or self._tokens >= self._text.max_tokens)
        return "length" if by_length else "stop"

    def _usage(self, prompt_tokens: int | None) -> dict[str, int]:
        if self._asked.choice:  # the prompt counts once, with the first of its answers
            prompt_tokens = 0
        estimated = {"prompt": prompt_tokens is None, "completion": not self._counts}
        prompt = _estimated(len(self._text.prompt.encode())) if prompt_tokens is None else prompt_tokens
        completion = self._tokens if self._counts else _estimated(self._bytes)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return usage | {f"{which}_tokens_estimated": True for which, is_so in estimated.items() if is_so}

    def _around(self) -> tuple[bytes, bytes]:
        """Return a chunk split at the JSON string of its text, so that only the text is encoded for each."""
        mark = uuid4().hex
        choice: dict[str, Any] = {"delta": {"content": mark}} if self._asked.is_chat else {"text": mark}
        before, _, after = self._chunk([{"index": 0, **choice, "logprobs": None, "finish_reason": None}]).partition(
            json.dumps(mark).encode()
        )
        return before, after

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        record = self._record("chat.completion.chunk" if self._asked.is_chat else "text_completion") | {
            "choices": choices
        }
        if self._asked.wants_usage:
            record["usage"] = usage
        return b"data: " + json.dumps(record).encode() + b"\n\n"

    def _record(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._asked.model}

    def _events(self, text: str) -> bytes:
        events = []
        if self._asked.is_chat and not self._has_begun:
            role = {"role": "assistant", "content": ""}
            events.append(self._chunk([{"index": 0, "delta": role, "logprobs": None, "finish_reason": None}]))
        self._has_begun = True
        if text and self._chosen is not None:
            content: dict[str, Any] = {"delta": {"content": text}} if self._asked.is_chat else {"text": text}
            choice = {"index": 0, **content, "logprobs": self._chosen.take(), "finish_reason": None}
            events.append(self._chunk([choice]))
        elif text:
            events.append(self._before + json.dumps(text).encode() + self._after)
        return b"".join(events)

    def _last_events(self, prompt_tokens: int | None) -> bytes:
        nothing: dict[str, Any] = {"delta": {}} if self._asked.is_chat else {"text": ""}
        chosen = None if self._chosen is None else self._chosen.take()
        events = [
            self._chunk([{"index": 0, **nothing, "logprobs": chosen, "finish_reason": self._reason(prompt_tokens)}])
        ]
        if self._asked.wants_usage:
            events.append(self._chunk([], self._usage(prompt_tokens)))
        return b"".join((*events, DONE))

    def _whole(self, prompt_tokens: int | None) -> bytes:
        text = "".join(self._pieces)
        content = {"message": {"role": "assistant", "content": text}} if self._asked.is_chat else {"text": text}
        chosen = None if self._chosen is None else self._chosen.take()
        choice = {"index": 0, **content, "logprobs": chosen, "finish_reason": self._reason(prompt_tokens)}
        record = self._record("chat.completion" if self._asked.is_chat else "text_completion")
        return json.dumps(record | {"choices": [choice], "usage": self._usage(prompt_tokens)}).encode()


class ChosenTokens:
    """The tokens of a text with the logarithm of each one's probability, as OpenAI's API has them.

    A token is passed on with the text that it ends in, and not at all if a stop word begins before its end.
    """

    def __init__(self, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._waiting: list[tuple[str, float | None]] = []
        self._passed: list[tuple[str, float | None, int]] = []
        self._offset = self._end = 0

    def add(self, piece: Piece, passed_characters: int) -> None:
        """Add a piece, of which and of those before it so many characters more were passed on."""
        if piece.text or piece.tokens:
            value = max(piece.logprobs[0], LOG_PROB_MIN) if piece.logprobs else None
            self._waiting.append((piece.text, value))
        self._end += passed_characters
        while self._waiting and self._offset + len(self._waiting[0][0]) <= self._end:
            token, value = self._waiting.pop(0)
            self._passed.append((token, value, self._offset))
            self._offset += len(token)

    def take(self) -> dict[str, Any]:
        """Return what has been passed on since the last call."""
        passed, self._passed = self._passed, []
        if self._is_chat:
            content = [
                {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
                for token, value, _ in passed
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [token for token, _, _ in passed],
            "token_logprobs": [value for _, value, _ in passed],
            "top_logprobs": None,
            "text_offset": [offset for _, _, offset in passed],
        }


class PassedOn:
    """The answer of an engine with an OpenAI API, passed on unchanged."""

    ended = False

    def take(self, reply: Reply) -> bytes:
        self.ended = reply.final
        return reply.raw

    def end(self, prompt_tokens: int | None) -> bytes:
        return b""


class StopWords:
    """Ends a text at the first stop word. What may become a stop word is held back until that is known.

    Engines end there by themselves if their tokens allow it, and leave the stop word in the text.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(word for word in words if word)
        self._held = ""
        self.found = False

    def pass_on(self, piece: str, final: bool) -> str:
        """Return the text that is now certain; "" once a stop word has been found."""
        if not self._words or self.found:
            return "" if self.found else piece
        text = self._held + piece
        found = [index for word in self._words if (index := text.find(word)) >= 0]
        if found:
            self.found, self._held = True, ""
            return text[: min(found)]
        kept = 0 if final else max(_begun(text, word) for word in self._words)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _begun(text: str, word: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a word."""
    for length in range(min(len(word) - 1, len(text)), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0


def _estimated(size_bytes: int) -> int:
    return -(-size_bytes // TOKEN_BYTES)
