"""What `Generate` asks, in the words of the models that may answer: the ensemble, the core model, the LLM-API model."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from sidecar.backends.api import Payload, Prompt
from sidecar.backends.dialects import TRITON, TRITON_LLMAPI
from sidecar.backends.wire import ModelInferRequest
from sidecar.errors import Reason, Refused

MAX_TOKENS_DEFAULT = 128
INT32_MAX = 2**31 - 1
"""Of the engine's tensors."""
_SAMPLING = (
    ("temperature", "FP32", "<f"),
    ("top_k", "INT32", "<i"),
    ("top_p", "FP32", "<f"),
    ("seed", "UINT64", "<Q"),
    ("repetition_penalty", "FP32", "<f"),
)
_LLMAPI_LACKS = ("repetition_penalty",)
"""Sampling fields that the LLM-API model has no input for: an answer without them is not the one that was asked for."""


def payload_of(request: Any, may_stream: Callable[[str], bool]) -> tuple[Payload, int]:
    """Return the engine's forms of a request and how many input tokens it counts as.

    `may_stream(kind)` says whether to stream where the client does not. Text is counted as a token a byte, its upper
    bound: only the engine has the tokenizer. Raises Refused(INVALID_REQUEST).
    """
    for field in ("max_tokens", "top_k"):
        if getattr(request, field) > INT32_MAX:
            raise Refused(Reason.INVALID_REQUEST, f"{field} is {getattr(request, field)}; at most {INT32_MAX} is taken")

    def streams(kind: str) -> bool:
        return bool(request.stream if request.HasField("stream") else may_stream(kind))

    prompt = request.WhichOneof("prompt")
    forms: dict[str, bytes] = {}
    if prompt == "text":
        text = request.text.encode()
        message = _text_request(request, text, streams(TRITON))
        count = len(text)
        if not any(request.HasField(field) for field in _LLMAPI_LACKS):
            forms[TRITON_LLMAPI] = _llmapi_request(request, text, streams(TRITON_LLMAPI)).SerializeToString()
    elif prompt == "tokens" and request.tokens.ids:
        message = _token_request(request, streams(TRITON))
        count = len(request.tokens.ids)
    else:
        raise Refused(Reason.INVALID_REQUEST, "the request has no prompt; set text or tokens")
    head = message.SerializeToString()
    return Payload(
        message.model_name, head, raw=True, unary=False, kind=TRITON, forms=forms, prompt=Prompt(prompt)
    ), count


def why_not_llmapi(request: Any) -> str:
    """Say why a request cannot go to an LLM-API model, and what would."""
    if request.WhichOneof("prompt") == "tokens":
        return "the backends take text only (TensorRT-LLM's LLM-API model); send the prompt as text, not as token ids"
    lacked = ", ".join(field for field in _LLMAPI_LACKS if request.HasField(field))
    return f"the backends have no {lacked} (TensorRT-LLM's LLM-API model); leave it out"


def _text_request(request: Any, text: bytes, streams: bool) -> Any:
    message = ModelInferRequest(model_name="ensemble")
    _add(message, "text_input", "BYTES", _bytes_tensor(text))
    _add(message, "max_tokens", "INT32", _int32(request.max_tokens or MAX_TOKENS_DEFAULT))
    _add(message, "stream", "BOOL", _bool(streams))
    _add(message, "exclude_input_in_output", "BOOL", _bool(True))
    _add_sampling(message, request, {"top_k": "top_k", "top_p": "top_p"})
    _add_stop_words(message, request, "stop_words")
    return message


def _token_request(request: Any, streams: bool) -> Any:
    if request.stop_words:
        raise Refused(
            Reason.INVALID_REQUEST, "stop_words need a text prompt: with token ids only the client knows them"
        )
    message = ModelInferRequest(model_name="tensorrt_llm")
    ids = np.asarray(request.tokens.ids, np.int32)
    _add(message, "input_ids", "INT32", ids.tobytes(), ids.size)
    _add(message, "input_lengths", "INT32", _int32(ids.size))
    _add(message, "request_output_len", "INT32", _int32(request.max_tokens or MAX_TOKENS_DEFAULT))
    _add(message, "streaming", "BOOL", _bool(streams))
    _add(message, "exclude_input_in_output", "BOOL", _bool(True))
    _add_sampling(message, request, {"top_k": "runtime_top_k", "top_p": "runtime_top_p"})
    return message


def _llmapi_request(request: Any, text: bytes, streams: bool) -> Any:
    message = ModelInferRequest(model_name="tensorrt_llm")
    _add(message, "text_input", "BYTES", _bytes_tensor(text))
    _add(message, "streaming", "BOOL", _bool(streams))
    _add(message, "sampling_param_max_tokens", "INT32", _int32(request.max_tokens or MAX_TOKENS_DEFAULT))
    _add(message, "sampling_param_exclude_input_from_output", "BOOL", _bool(True))
    _add_sampling(message, request, {field: f"sampling_param_{field}" for field, _, _ in _SAMPLING})
    _add_stop_words(message, request, "sampling_param_stop")
    for tensor in message.inputs:
        del tensor.shape[0]  # it has no batch dimension
    return message


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
