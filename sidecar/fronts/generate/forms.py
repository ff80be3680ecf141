"""What `Generate` asks, in the words of the engines that may answer.

TensorRT-LLM's ensemble and LLM-API model take text, its core model token ids, vLLM both. What an engine has no word
for it is not asked: an answer without it is not the one that was wanted.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from sidecar.backends.api import Form, HttpForm, Payload, Prompt
from sidecar.backends.triton.dialects import TRITON, TRITON_LLMAPI, VLLM
from sidecar.backends.triton.wire import ModelInferRequest
from sidecar.errors import Reason, Refused

MAX_TOKENS_DEFAULT = 128
INT32_MAX = 2**31 - 1
"""Of the engine's tensors."""
TOKEN_IDS_MAX = 1 << 20
STOP_WORDS_MAX = 256
COMPLETIONS = "/v1/completions"
_SAMPLING = (
    ("temperature", "FP32", "<f"),
    ("top_k", "INT32", "<i"),
    ("top_p", "FP32", "<f"),
    ("seed", "UINT64", "<Q"),
    ("repetition_penalty", "FP32", "<f"),
)
_LLMAPI_LACKS = ("repetition_penalty",)
"""Sampling fields that the LLM-API model has no input for."""


@dataclass(frozen=True)
class Scalar:
    """A tensor of one element that only one front asks for: its name in the ensemble and in the LLM-API model.

    An empty name: that model has no such input.
    """

    ensemble: str
    llmapi: str
    datatype: str
    data: bytes


def payload_of(request: Any, may_stream: Callable[[str], bool], served: Collection[str] = ()) -> tuple[Payload, int]:
    """Return the engines' forms of a request and how many input tokens it counts as.

    `may_stream(kind)` says whether to stream where the client does not; forms are made for the kinds of engines that
    are `served`, all if none is named. Text is counted as a token a byte, its upper bound: only the engine has the
    tokenizer. Raises Refused(INVALID_REQUEST).
    """
    _check(request)
    prompt = request.WhichOneof("prompt")
    count = len(request.text.encode()) if prompt == "text" else len(request.tokens.ids)

    def streams(kind: str) -> bool:
        return bool(request.stream if request.HasField("stream") else may_stream(kind))

    forms = {kind: _FORMS[kind](request, streams(kind)) for kind in _kinds_among(served) if not _WHY_NOT[kind](request)}
    if not forms:
        raise Refused(Reason.INVALID_REQUEST, why_not(request, served))
    kind = next(iter(forms))
    return Payload("", forms.pop(kind), raw=True, unary=False, kind=kind, forms=forms, prompt=Prompt(prompt)), count


def _kinds_among(served: Collection[str]) -> list[str]:
    """Return the kinds to write a request for. Which of TensorRT-LLM's models a server has may not be known yet."""
    triton = (TRITON, TRITON_LLMAPI)
    return [kind for kind in _FORMS if not served or kind in served or (kind in triton and {*triton} & {*served})]


def why_not(request: Any, served: Collection[str]) -> str:
    """Say why none of some kinds of engines can answer a request, and what would help."""
    reasons = [_WHY_NOT[kind](request) for kind in served or _FORMS if kind in _WHY_NOT]
    return next(filter(None, reasons), f"the backends ({', '.join(served)}) are of kinds that Generate cannot ask")


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


def _why_not_triton(request: Any) -> str:
    if request.WhichOneof("prompt") == "tokens" and request.stop_words:
        return "stop_words need a text prompt: with token ids only the client knows them"
    return ""


def _why_not_llmapi(request: Any) -> str:
    if request.WhichOneof("prompt") == "tokens":
        return "the backends take text only (TensorRT-LLM's LLM-API model); send the prompt as text, not as token ids"
    lacked = ", ".join(field for field in _LLMAPI_LACKS if request.HasField(field))
    return f"the backends have no {lacked} (TensorRT-LLM's LLM-API model); leave it out" if lacked else ""


def _triton_form(request: Any, streams: bool) -> bytes:
    if request.WhichOneof("prompt") == "text":
        return ensemble_form(request, streams)
    message = ModelInferRequest(model_name="tensorrt_llm")
    ids = np.asarray(request.tokens.ids, np.int32)
    _add(message, "input_ids", "INT32", ids.tobytes(), ids.size)
    _add(message, "input_lengths", "INT32", _int32(ids.size))
    _add(message, "request_output_len", "INT32", _int32(request.max_tokens or MAX_TOKENS_DEFAULT))
    _add(message, "streaming", "BOOL", _bool(streams))
    _add(message, "exclude_input_in_output", "BOOL", _bool(True))
    _add_sampling(message, request, {"top_k": "runtime_top_k", "top_p": "runtime_top_p"})
    return bytes(message.SerializeToString())


def ensemble_form(request: Any, streams: bool, more: Collection[Scalar] = ()) -> bytes:
    """Return a `GenerateRequest` with a text as the ensemble takes it."""
    message = ModelInferRequest(model_name="ensemble")
    _add(message, "text_input", "BYTES", _bytes_tensor(request.text.encode()))
    _add(message, "max_tokens", "INT32", _int32(request.max_tokens or MAX_TOKENS_DEFAULT))
    _add(message, "stream", "BOOL", _bool(streams))
    _add(message, "exclude_input_in_output", "BOOL", _bool(True))
    _add_sampling(message, request, {"top_k": "top_k", "top_p": "top_p"})
    for scalar in more:
        _add(message, scalar.ensemble, scalar.datatype, scalar.data)
    _add_stop_words(message, request, "stop_words")
    return bytes(message.SerializeToString())


def llmapi_form(request: Any, streams: bool, more: Collection[Scalar] = ()) -> bytes:
    """Return a `GenerateRequest` with a text as the LLM-API model takes it."""
    message = ModelInferRequest(model_name="tensorrt_llm")
    _add(message, "text_input", "BYTES", _bytes_tensor(request.text.encode()))
    _add(message, "streaming", "BOOL", _bool(streams))
    _add(message, "sampling_param_max_tokens", "INT32", _int32(request.max_tokens or MAX_TOKENS_DEFAULT))
    _add(message, "sampling_param_exclude_input_from_output", "BOOL", _bool(True))
    _add_sampling(message, request, {field: f"sampling_param_{field}" for field, _, _ in _SAMPLING})
    for scalar in more:
        _add(message, scalar.llmapi, scalar.datatype, scalar.data)
    _add_stop_words(message, request, "sampling_param_stop")
    for tensor in message.inputs:
        del tensor.shape[0]  # it has no batch dimension
    return bytes(message.SerializeToString())


def _vllm_form(request: Any, streams: bool) -> HttpForm:
    is_text = request.WhichOneof("prompt") == "text"
    body: dict[str, Any] = {
        "prompt": request.text if is_text else list(request.tokens.ids),
        "max_tokens": request.max_tokens or MAX_TOKENS_DEFAULT,
        "stream": streams,
        "return_token_ids": True,
        **{field: getattr(request, field) for field, _, _ in _SAMPLING if request.HasField(field)},
    }
    if request.stop_words:
        body["stop"] = list(request.stop_words)
    return HttpForm(COMPLETIONS, b'{"model":', b"," + json.dumps(body).encode()[1:], request.adapter, streams)


_WHY_NOT: dict[str, Callable[[Any], str]] = {
    TRITON: _why_not_triton,
    TRITON_LLMAPI: _why_not_llmapi,
    VLLM: lambda request: "",
}
_FORMS: dict[str, Callable[[Any, bool], Form]] = {
    TRITON: _triton_form,
    TRITON_LLMAPI: llmapi_form,
    VLLM: _vllm_form,
}


def _add_sampling(message: Any, request: Any, names: dict[str, str]) -> None:
    """Add the sampling fields that the client set, under the model's names; the rest is the engine's default."""
    for field, datatype, form in _SAMPLING:
        if request.HasField(field):
            _add(message, names.get(field, field), datatype, struct.pack(form, getattr(request, field)))


def _add_stop_words(message: Any, request: Any, name: str) -> None:
    if request.stop_words:
        words = [_bytes_tensor(word.encode()) for word in request.stop_words]
        _add(message, name, "BYTES", b"".join(words), len(words))


def _add(message: Any, name: str, datatype: str, data: bytes, size: int = 1) -> None:
    message.inputs.add(name=name, datatype=datatype, shape=[1, size])
    message.raw_input_contents.append(data)


def _bytes_tensor(text: bytes) -> bytes:
    return struct.pack("<I", len(text)) + text


def _int32(value: int) -> bytes:
    return struct.pack("<i", value)


def _bool(value: bool) -> bytes:
    return b"\1" if value else b"\0"
