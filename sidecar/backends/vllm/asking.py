"""Put our own requests to vLLM, and read its answers: its completions take text and token ids."""

from __future__ import annotations

from sidecar.backends.api import HttpForm, Reply
from sidecar.backends.kind import Ask, Asking, Piece
from sidecar.backends.openai.asking import completion
from sidecar.backends.openai.events import record_of


def _write(ask: Ask, streams: bool) -> HttpForm:
    return completion(ask, streams, return_token_ids=True, **({} if ask.salt is None else {"cache_salt": ask.salt}))


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
