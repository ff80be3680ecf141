"""The responses of a model: the tensors of each, shaped as `fillTritonResponse` in `model_instance_state.cc` does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from sidecar.lab.engine.kserve.datatypes import DATATYPES, join_bytes
from sidecar.lab.engine.kserve.generation import Wanted
from sidecar.lab.engine.kserve.models import Model
from sidecar.lab.engine.kserve.work import Work
from sidecar.lab.engine.tokens import ByteTokenizer

ALWAYS = ("output_ids", "sequence_length")
"""The outputs that a client must include if it lists outputs at all."""


@dataclass(frozen=True)
class Values:
    """One output tensor: its wire shape and its elements (bytes objects for BYTES)."""

    name: str
    shape: tuple[int, ...]
    elements: Sequence[Any]


def missing_output(model: Model, requested: Iterable[str]) -> str | None:
    """Return the backend's error text if the listed outputs omit one that it needs, or None."""
    listed = set(requested)
    if not listed or "output_ids" not in model.outputs:
        return None
    for name in ALWAYS:
        if name not in listed:
            return (
                "Error encountered while populating response: [TensorRT-LLM][ERROR] "
                f"{name} tensor must be present in list of output tensors"
            )
    return None


def answer_values(
    model: Model, work: Work, tokens: Sequence[int], wanted: Wanted, batch_size: int, tokens_per_block: int
) -> list[Values]:
    """Return the outputs that carry `tokens`, with those that the client turned on by a flag."""
    values = _text_values(tokens) if model.is_text else _token_values(tokens)
    if work.generation.log_probs:
        values.extend(_log_prob_values(work, len(tokens) if wanted.streaming else len(work.tokens)))
    if batch_size > 1:
        values.append(Values("batch_index", (1, 1), [work.batch_row]))
    if wanted.num_input_tokens:
        values.append(Values("num_input_tokens", (1, 1), [len(work.generation.tokens)]))
    if wanted.num_output_tokens:
        values.append(Values("num_output_tokens", (1, 1), [len(tokens)]))
    if wanted.perf_metrics:
        values.extend(_perf_values(work, tokens_per_block))
    return values


def response(model: Model, triton_id: str, values: Iterable[Values]) -> Any:
    """Return a ModelInferResponse with these values."""
    message = service_pb2.ModelInferResponse(model_name=model.name, model_version="1", id=triton_id)
    if model.is_text:
        # An ensemble copies its request's sequence parameters, and so says that there is no sequence.
        message.parameters["sequence_id"].int64_param = 0
        message.parameters["sequence_start"].bool_param = False
        message.parameters["sequence_end"].bool_param = False
    for value in values:
        datatype = DATATYPES[model.outputs[value.name].datatype]
        message.outputs.add(name=value.name, datatype=datatype.name, shape=value.shape)
        message.raw_output_contents.append(_bytes_of(value, datatype.numpy))
    return message


def _bytes_of(value: Values, dtype: Any) -> bytes:
    if dtype is None:
        return join_bytes(list(value.elements))
    return np.array(value.elements, dtype=dtype).tobytes()


def _token_values(tokens: Sequence[int]) -> list[Values]:
    return [
        Values("output_ids", (1, 1, len(tokens)), tokens),
        Values("sequence_length", (1, 1), [len(tokens)]),
    ]


def _text_values(tokens: Sequence[int]) -> list[Values]:
    return [Values("text_output", (1,), [ByteTokenizer().decode(tokens).encode("utf-8")])]


def _log_prob_values(work: Work, count: int) -> list[Values]:
    """Return the log probabilities of this response's new tokens, and the sum over all tokens so far."""
    newest = work.log_probs[work.sent - count : work.sent]
    return [
        Values("cum_log_probs", (1, 1), [sum(work.log_probs[: work.sent])]),
        Values("output_log_probs", (1, 1, count), newest),
    ]


def _perf_values(work: Work, tokens_per_block: int) -> list[Values]:
    """Return times and blocks of the request so far; this engine never reuses blocks."""
    length = len(work.generation.tokens) + len(work.tokens)
    blocks = -(-length // tokens_per_block)
    numbers = {
        "kv_cache_alloc_new_blocks": blocks,
        "kv_cache_reused_blocks": 0,
        "kv_cache_alloc_total_blocks": blocks,
    }
    return [Values(name, (1, 1), [number]) for name, number in (numbers | times_of(work)).items()]


def times_of(work: Work) -> dict[str, int]:
    """Return the times of a request's milestones by the outputs' names."""
    return {
        "arrival_time_ns": work.arrival_ns,
        "first_scheduled_time_ns": work.scheduled_ns,
        "first_token_time_ns": work.first_token_ns,
        "last_token_time_ns": work.last_token_ns,
    }
