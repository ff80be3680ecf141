"""Put our own requests to TensorRT-LLM's models behind Triton, and read their answers.

The ensemble takes text, the core model token ids, and the LLM-API model text under other names. An `Ask` that needs an
input which a model lacks is not put to it: the answer would not be the one that was wanted.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from sidecar.backends.api import Prompt, Reply
from sidecar.backends.kind import Ask, Asking, Piece
from sidecar.backends.wire import ModelInferRequest

_SAMPLING = (
    ("temperature", "FP32", "<f"),
    ("top_k", "INT32", "<i"),
    ("top_p", "FP32", "<f"),
    ("seed", "UINT64", "<Q"),
    ("repetition_penalty", "FP32", "<f"),
    ("min_tokens", "INT32", "<i"),
)
_PENALTIES = ("presence_penalty", "frequency_penalty")
_LLMAPI_LACKS = ("repetition_penalty", "ignore_eos", "min_tokens", "logprobs")
"""Fields for which the LLM-API model has no input."""
NO_END = -1
"""The id of no token: the answer ends by its length only."""
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""The end of a text whose last character is still incomplete."""


def _why_not_core(ask: Ask) -> str:
    if ask.text is not None:
        return ""
    if ask.stop_words:
        return "stop_words need a text prompt: with token ids only the client knows them"
    lacked = [name for name in (*_PENALTIES, "ignore_eos") if getattr(ask, name) not in (None, False)]
    return f"{' and '.join(lacked)} need a text prompt; leave it out" if lacked else ""


def _write_core(ask: Ask, streams: bool) -> bytes:
    return _ensemble(ask, streams) if ask.text is not None else _core(ask, streams)


def _core(ask: Ask, streams: bool) -> bytes:
    message = ModelInferRequest(model_name="tensorrt_llm")
    ids = np.asarray(ask.token_ids, np.int32)
    _add(message, "input_ids", "INT32", ids.tobytes(), ids.size)
    _add(message, "input_lengths", "INT32", _int32(ids.size))
    _add(message, "request_output_len", "INT32", _int32(ask.max_tokens))
    _add(message, "streaming", "BOOL", _bool(streams))
    _add(message, "exclude_input_in_output", "BOOL", _bool(True))
    _add_sampling(message, ask, {"top_k": "runtime_top_k", "top_p": "runtime_top_p"})
    return bytes(message.SerializeToString())


def _ensemble(ask: Ask, streams: bool) -> bytes:
    message = ModelInferRequest(model_name="ensemble")
    _add(message, "text_input", "BYTES", _bytes_tensor((ask.text or "").encode()))
    _add(message, "max_tokens", "INT32", _int32(ask.max_tokens))
    _add(message, "stream", "BOOL", _bool(streams))
    _add(message, "exclude_input_in_output", "BOOL", _bool(True))
    _add_sampling(message, ask, {})
    _add_penalties(message, ask, "")
    if ask.logprobs:
        _add(message, "return_log_probs", "BOOL", _bool(True))
    if ask.ignore_eos:
        _add(message, "end_id", "INT32", _int32(NO_END))
    _add_stop_words(message, ask, "stop_words")
    return bytes(message.SerializeToString())


def _why_not_llmapi(ask: Ask) -> str:
    if ask.text is None:
        return "the backends take text only (TensorRT-LLM's LLM-API model); send the prompt as text, not as token ids"
    lacked = " and no ".join(name for name in _LLMAPI_LACKS if getattr(ask, name) not in (None, False))
    return f"the backends have no {lacked} (TensorRT-LLM's LLM-API model); leave it out" if lacked else ""


def _write_llmapi(ask: Ask, streams: bool) -> bytes:
    message = ModelInferRequest(model_name="tensorrt_llm")
    _add(message, "text_input", "BYTES", _bytes_tensor((ask.text or "").encode()))
    _add(message, "streaming", "BOOL", _bool(streams))
    _add(message, "sampling_param_max_tokens", "INT32", _int32(ask.max_tokens))
    _add(message, "sampling_param_exclude_input_from_output", "BOOL", _bool(True))
    _add_sampling(message, ask, {field: f"sampling_param_{field}" for field, _, _ in _SAMPLING})
    _add_penalties(message, ask, "sampling_param_")
    _add_stop_words(message, ask, "sampling_param_stop")
    for tensor in message.inputs:
        del tensor.shape[0]  # it has no batch dimension
    return bytes(message.SerializeToString())


def _add_sampling(message: Any, ask: Ask, names: dict[str, str]) -> None:
    """Add the sampling fields that are set, under the model's names; the engine has defaults for the others."""
    for field, datatype, form in _SAMPLING:
        value = getattr(ask, field)
        if value is not None:
            _add(message, names.get(field, field), datatype, struct.pack(form, value))


def _add_penalties(message: Any, ask: Ask, prefix: str) -> None:
    for field in _PENALTIES:
        value = getattr(ask, field)
        if value is not None:
            _add(message, f"{prefix}{field}", "FP32", struct.pack("<f", value))


def _add_stop_words(message: Any, ask: Ask, name: str) -> None:
    if ask.stop_words:
        words = [_bytes_tensor(word.encode()) for word in ask.stop_words]
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


class _Reader:
    """Reads replies of the core model and of the ensemble: each has what is new."""

    def __init__(self, is_text: bool) -> None:
        self._is_text = is_text

    def read(self, reply: Reply) -> Piece:
        text, tokens = "", 0
        ids: list[int] = []
        lengths: list[int] = []
        logprobs: list[float] = []
        for output, data in zip(reply.message.outputs, reply.message.raw_output_contents, strict=False):
            if output.name == "text_output" and self._is_text:
                text = b"".join(_strings(data)).decode(errors="replace")
                tokens = tokens or 1
            elif output.name == "output_ids":
                ids = np.frombuffer(data, "<i4").tolist()
            elif output.name in ("sequence_length", "num_output_tokens"):
                lengths = np.frombuffer(data, "<i4").tolist()
            elif output.name == "output_log_probs":
                logprobs = np.frombuffer(data, "<f4").tolist()
        if lengths:
            ids, tokens = ids[: lengths[0]], lengths[0]
        return Piece(text, ids, tokens, logprobs[-tokens:] if tokens else (), bool(lengths))


class _WholeTextReader(_Reader):
    """Reads replies of the LLM-API model: each has the whole text so far."""

    def __init__(self, is_text: bool) -> None:
        super().__init__(is_text)
        self._read_characters = 0
        self._held = ""

    def read(self, reply: Reply) -> Piece:
        piece = super().read(reply)
        return piece._replace(text=self._added(piece.text, piece.tokens > 0, reply.final)) if self._is_text else piece

    def _added(self, text: str, has_text: bool, final: bool) -> str:
        """Return the new text. A character that may still be incomplete is held back until the end."""
        if not has_text:
            text = self._held  # an end without data
        self._held = text
        settled = text if final else text.rstrip(INCOMPLETE)
        piece = settled[self._read_characters :]
        self._read_characters = max(self._read_characters, len(settled))
        return piece


def _strings(data: bytes) -> list[bytes]:
    """Split a BYTES tensor; each element is a length in four bytes and its content."""
    found, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return found


CORE = Asking(_write_core, _why_not_core, _Reader)
LLMAPI = Asking(_write_llmapi, _why_not_llmapi, _WholeTextReader, frozenset({Prompt.TEXT}))
