"""The bodies of answers as vLLM 0.33.0's Rust front end writes them.

Chunks have no key without a value. The end of a choice is an event of its own, and so is the begin of a chat.
"""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.lab.engine.http.json_text import as_json, event
from sidecar.lab.engine.http.work import TextWork
from sidecar.lab.engine.openai.bodies import Bodies, ChatBodies, CompletionBodies, Json, Piece, usage_of

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
