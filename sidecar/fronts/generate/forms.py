"""Write a `Generate` request for the engines that may answer it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sidecar.backends import registry
from sidecar.backends.api import Payload, Prompt, Whole
from sidecar.backends.kind import Ask, write_for
from sidecar.errors import Reason, Refused

MAX_TOKENS_DEFAULT = 128
INT32_MAX = 2**31 - 1
"""Largest value of the engine's tensors."""
TOKEN_IDS_MAX = 1 << 20
STOP_WORDS_MAX = 256
_SAMPLING = ("temperature", "top_k", "top_p", "seed", "repetition_penalty")


def payload_of(
    request: Any, may_stream: Callable[[str], bool], served: Sequence[str] = (), salt: str | None = None
) -> tuple[Payload, int]:
    """Return a request written for its engines, and the number of input tokens that it counts as.

    `may_stream(kind)` says whether to stream if the client does not say. It is written for the kinds of model in
    `served` and their siblings, for all if `served` is empty. Text counts as one token a byte, an upper bound: only the
    engine has the tokenizer. Raises Refused(INVALID_REQUEST).
    """
    _check(request)
    ask = replace(_ask(request), salt=salt)
    count = len(ask.text.encode()) if ask.text is not None else len(ask.token_ids)
    streams = {
        model: bool(request.stream if request.HasField("stream") else may_stream(model.name))
        for model in registry.siblings(served)
    }
    forms, _ = write_for(ask, streams)
    if not forms:
        raise Refused(Reason.INVALID_REQUEST, why_not(request, served))
    kind = next(iter(forms))
    prompt = Prompt(request.WhichOneof("prompt"))
    whole = Whole() if request.HasField("stream") and not request.stream else None
    head = forms.pop(kind)
    return Payload("", head, raw=True, unary=False, kind=kind, forms=forms, prompt=prompt, whole=whole), count


def why_not(request: Any, served: Sequence[str]) -> str:
    """Return why no model of these kinds can answer a request, and what would help."""
    ask = _ask(request)
    models = map(registry.model_kind, served) if served else registry.siblings(())
    reasons = (model.asking.why_not(ask) for model in models if model.asking is not None)
    return next(filter(None, reasons), f"the backends ({', '.join(served)}) are of kinds that Generate cannot ask")


def _ask(request: Any) -> Ask:
    is_text = request.WhichOneof("prompt") == "text"
    return Ask(
        text=request.text if is_text else None,
        token_ids=() if is_text else request.tokens.ids,
        max_tokens=request.max_tokens or MAX_TOKENS_DEFAULT,
        model=request.adapter,
        stop_words=tuple(request.stop_words),
        **{field: getattr(request, field) for field in _SAMPLING if request.HasField(field)},
    )


def _check(request: Any) -> None:
    for field in ("max_tokens", "top_k"):
        if getattr(request, field) > INT32_MAX:
            raise Refused(Reason.INVALID_REQUEST, f"{field} is {getattr(request, field)}; at most {INT32_MAX} is taken")
    for field in ("temperature", "top_p", "repetition_penalty"):
        if not math.isfinite(getattr(request, field)):
            raise Refused(Reason.INVALID_REQUEST, f"{field} is {getattr(request, field)}; it must be a number")
    for field, count, count_max in (
        ("token ids", len(request.tokens.ids), TOKEN_IDS_MAX),
        ("stop_words", len(request.stop_words), STOP_WORDS_MAX),
    ):
        if count > count_max:
            raise Refused(Reason.INVALID_REQUEST, f"the request has {count} {field}; at most {count_max} are taken")
    prompt = request.WhichOneof("prompt")
    if prompt is None or (prompt == "tokens" and not request.tokens.ids):
        raise Refused(Reason.INVALID_REQUEST, "the request has no prompt; set text or tokens")
