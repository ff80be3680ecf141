"""From a request's tensors to an executor request, with the checks of the backend.

Source: `inflight_batcher_llm/src/utils.cc` and `model_instance_state.cc` (createExecutorRequests). Generation is
greedy: sampling tensors, stop words and bad words are accepted and change nothing. Beams, several sequences and logits
are refused, because an answer without them would be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidecar.lab.engine.kserve.errors import BackendError
from sidecar.lab.engine.kserve.models import Model
from sidecar.lab.engine.kserve.tensors import Tensor
from sidecar.lab.engine.spec import EngineSpec
from sidecar.lab.engine.tokens import EOS, ByteTokenizer

_UNSUPPORTED = {
    "return_context_logits": "context logits need an engine built with gather_context_logits",
    "return_generation_logits": "generation logits need an engine built with gather_generation_logits",
}


@dataclass(frozen=True)
class LoraTensors:
    """A request's LoRA inputs without the batch dimension: weights [N, W] and config [N, 3]; either may be missing."""

    task_id: int
    weights: NDArray[Any] | None
    config: NDArray[np.int32] | None


@dataclass(frozen=True)
class Generation:
    """One executor request. `tokens` is the prompt; with `end_id` None it runs to `max_new_tokens`."""

    tokens: list[int]
    max_new_tokens: int
    end_id: int | None
    lora: LoraTensors | None
    log_probs: bool = False


@dataclass(frozen=True)
class Wanted:
    """The form of the answer that the client wants."""

    streaming: bool
    exclude_input: bool
    num_input_tokens: bool
    num_output_tokens: bool
    perf_metrics: bool
    finish_reason: bool = False
    stop_reason: bool = False


class Reader:
    """Reads scalar inputs of one request; every scalar has the wire shape [B, 1]."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def array(self, name: str) -> NDArray[Any] | None:
        """Return a tensor as an array with its batch dimension, or None."""
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.array()

    def flag(self, name: str, default: bool = False) -> bool:
        """Return the first element as a bool."""
        array = self.array(name)
        return default if array is None or array.size == 0 else bool(array.reshape(-1)[0])

    def number(self, name: str, row: int, default: int | None = None) -> int | None:
        """Return the element of one batch row."""
        array = self.array(name)
        return default if array is None or array.size == 0 else int(array[row].reshape(-1)[0])

    def required(self, name: str, row: int) -> int:
        """Return the element of one batch row. Raises BackendError if the input is missing."""
        value = self.number(name, row)
        if value is None:
            raise BackendError(f"{name} is not present in the request")
        return value

    def batch_size(self) -> int:
        """Return the common batch dimension."""
        return next((tensor.shape[0] for tensor in self._tensors.values()), 0)


def read_wanted(model: Model, reader: Reader, exclude_input_default: bool) -> Wanted:
    """Return how to answer. Raises BackendError for streaming on a model that is not decoupled."""
    streaming = reader.flag(model.names.streaming)
    if streaming and not model.decoupled:
        raise BackendError("Streaming is only supported if model is deployed using decoupled mode.")
    return Wanted(
        streaming=streaming,
        exclude_input=reader.flag("exclude_input_in_output", exclude_input_default),
        num_input_tokens=reader.flag("return_num_input_tokens"),
        num_output_tokens=reader.flag("return_num_output_tokens"),
        perf_metrics=reader.flag("return_perf_metrics"),
    )


def read_generations(model: Model, reader: Reader, spec: EngineSpec, has_log_probs: bool) -> list[Generation]:
    """Return one executor request per batch row. Raises BackendError with the backend's text."""
    rows = reader.batch_size()
    if rows > 1 and not model.decoupled:
        raise BackendError("Batch size > 1 requires the tensorrt_llm backend to be using decoupled transaction policy")
    _refuse_unsupported(reader)
    if reader.flag("return_log_probs") and not has_log_probs:
        raise BackendError("return_log_probs: an engine that computes nothing has no probabilities")
    lora = _read_lora(reader, rows)
    return [_read_row(model, reader, row, spec, lora) for row in range(rows)]


def _read_row(model: Model, reader: Reader, row: int, spec: EngineSpec, lora: LoraTensors | None) -> Generation:
    tokens = _text_tokens(reader, row) if model.is_text else _tokens(reader, row)
    asked = reader.required(model.names.max_tokens, row)
    if not tokens:
        raise BackendError("[TensorRT-LLM][ERROR] Assertion failed: !mInputTokenIds.empty()")
    if asked <= 0:
        raise BackendError("[TensorRT-LLM][ERROR] Assertion failed: mMaxNewTokens > 0")
    if not 0 <= min(tokens) <= max(tokens) < spec.shape.vocab:
        raise BackendError(
            f"[TensorRT-LLM][ERROR] Assertion failed: input_ids must be in the range [0, {spec.shape.vocab})"
        )
    end_id = reader.number("end_id", row, EOS if model.is_text else None)
    # The executor shortens an answer that does not fit instead of refusing it (llmRequest.h, validate).
    fitting = max(1, min(asked, spec.max_seq_tokens - len(tokens)))
    return Generation(tokens, fitting, end_id if end_id != -1 else None, lora, reader.flag("return_log_probs"))


def _tokens(reader: Reader, row: int) -> list[int]:
    ids = reader.array("input_ids")
    if ids is None:
        raise BackendError("input_ids is not present in the request")
    length = reader.required("input_lengths", row)
    tokens: list[int] = ids[row, :length].tolist()
    return tokens


def _text_tokens(reader: Reader, row: int) -> list[int]:
    texts = reader.array("text_input")
    if texts is None:
        raise BackendError("text_input is not present in the request")
    return ByteTokenizer().encode(texts[row].reshape(-1)[0].decode("utf-8", errors="replace"))


def _read_lora(reader: Reader, rows: int) -> LoraTensors | None:
    """Return the LoRA inputs; None without a task id, since the backend reads the others only with one."""
    if reader.array("lora_task_id") is None:
        return None
    task_id = reader.required("lora_task_id", 0)
    weights, config = reader.array("lora_weights"), reader.array("lora_config")
    if rows > 1 and (weights is not None or config is not None):
        raise BackendError("Expected batch dimension to be 1 for each lora request")
    if weights is not None and config is None:
        raise BackendError("Request for LoRA inference with lora weights must also have lora config")
    if weights is not None and config is not None and weights.shape[1] != config.shape[1]:
        raise BackendError("Expected dim 0 of lora weights and lora config to have the same size")
    return LoraTensors(task_id, None if weights is None else weights[0], None if config is None else config[0])


def _refuse_unsupported(reader: Reader) -> None:
    beams = reader.number("beam_width", 0, 1)
    if beams is not None and beams > 1:
        raise BackendError(f"Requested beam width {beams} is larger than configured max beam width 1")
    sequences = reader.number("num_return_sequences", 0, 1)
    if sequences is not None and sequences > 1:
        raise BackendError(f"num_return_sequences {sequences} is not available from this engine")
    for name, reason in _UNSUPPORTED.items():
        if reader.flag(name):
            raise BackendError(f"{name}: {reason}")
