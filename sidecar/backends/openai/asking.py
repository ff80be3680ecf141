"""Write a request of our own for an engine's `/v1/completions`, and read its answer."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from sidecar.backends.api import HttpForm, Reply
from sidecar.backends.kind import Ask, Asking, Piece
from sidecar.backends.openai.events import record_of
from sidecar.backends.openai.paths import COMPLETIONS, POOLING, ROWS

_OPTIONAL = (
    "temperature", "top_k", "top_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "min_tokens",
)  # fmt: skip


def remedy(member: str, known: Iterable[str], otherwise: str) -> str:
    """Return the known member that one is a misspelling of, as a question; `otherwise` if it is of none."""
    near = difflib.get_close_matches(member[:80], known, n=1, cutoff=0.85)
    return f'did you mean "{near[0]}"?' if near else otherwise


def completion(ask: Ask, streams: bool, **more: Any) -> HttpForm:
    """Return the request for text or token ids; `more` are members that only this kind of engine knows."""
    body: dict[str, Any] = {
        "prompt": ask.text if ask.text is not None else list(ask.token_ids),
        "max_tokens": ask.max_tokens,
        "stream": streams,
        **more,
        **{field: getattr(ask, field) for field in _OPTIONAL if getattr(ask, field) is not None},
    }
    if ask.ignore_eos:
        body["ignore_eos"] = True
    if ask.stop_words:
        body["stop"] = list(ask.stop_words)
    return HttpForm(COMPLETIONS, b'{"model":', b"," + json.dumps(body).encode()[1:], ask.model, streams)


def pooled(ask: Ask) -> HttpForm:
    """Return the request for what a pooler makes of text or token ids."""
    asked = {"input": ask.text if ask.text is not None else list(ask.token_ids)}
    return HttpForm(ROWS[POOLING].at_engine, b'{"model":', b"," + json.dumps(asked).encode()[1:], ask.model, False)


class NumbersReader:
    """Reads what a pooler made: its numbers as a text, so roughly that two engines of one model write the same."""

    def read(self, reply: Reply) -> Piece:
        (datum,) = record_of(reply.raw)["data"]
        return Piece(" ".join(f"{number:.1g}" for number in np.ravel(datum["data"])))


POOLED = Asking(lambda ask, streams: pooled(ask), lambda ask: "", lambda is_text: NumbersReader())
"""How an engine is asked that does not generate."""


class IdsReader:
    """Reads events of a stream, or a whole answer, that have token ids."""

    def __init__(self, is_text: bool) -> None:
        self._is_text = is_text

    def read(self, reply: Reply) -> Piece:
        choices = record_of(reply.raw).get("choices", [])
        if not choices:
            return Piece()
        ids = choices[0].get("token_ids") or ()
        return Piece(choices[0].get("text") or "", (), len(ids)) if self._is_text else Piece("", ids, len(ids))
