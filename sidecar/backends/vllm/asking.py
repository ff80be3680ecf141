"""Put our own requests to vLLM, and read its answers: its completions take text and token ids."""

from __future__ import annotations

import json
from typing import Any

from sidecar.backends.api import HttpForm, Reply
from sidecar.backends.kind import Ask, Asking, Piece
from sidecar.backends.openai.events import record_of

COMPLETIONS = "/v1/completions"
_OPTIONAL = (
    "temperature", "top_k", "top_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def _write(ask: Ask, streams: bool) -> HttpForm:
    body: dict[str, Any] = {
        "prompt": ask.text if ask.text is not None else list(ask.token_ids),
        "max_tokens": ask.max_tokens,
        "stream": streams,
        "return_token_ids": True,
        **{field: getattr(ask, field) for field in _OPTIONAL if getattr(ask, field) is not None},
    }
    if ask.ignore_eos:
        body["ignore_eos"] = True
    if ask.stop_words:
        body["stop"] = list(ask.stop_words)
    return HttpForm(COMPLETIONS, b'{"model":', b"," + json.dumps(body).encode()[1:], ask.model, streams)


class _Reader:
    """Reads events of a stream, or a whole answer, with token ids."""

    def __init__(self, is_text: bool) -> None:
        self._is_text = is_text

    def read(self, reply: Reply) -> Piece:
        choices = record_of(reply.raw).get("choices", [])
        if not choices:
            return Piece()
        ids = choices[0].get("token_ids") or ()
        return Piece(choices[0].get("text") or "", (), len(ids)) if self._is_text else Piece("", ids, len(ids))


ASKING = Asking(_write, lambda ask: "", _Reader)
