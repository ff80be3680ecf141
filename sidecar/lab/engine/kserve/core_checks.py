"""The checks of Triton's core before a model sees a request, in its order and with its texts.

Source: `core/src/infer_request.cc`, InferenceRequest::Normalize. Where the server walks an unordered map, this walks
the inputs in the order of the request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from sidecar.lab.engine.kserve.datatypes import BYTES_LENGTH_SIZE
from sidecar.lab.engine.kserve.errors import Rejection, id_prefix
from sidecar.lab.engine.kserve.models import Model, TensorSpec
from sidecar.lab.engine.kserve.steps import QUESTIONS
from sidecar.lab.engine.kserve.tensors import Tensor

_BATCH_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try "
    "setting max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)


def check_request(request: Any, model: Model, tensors: dict[str, Tensor]) -> None:
    """Raise Rejection for the first thing in the request that the model's config does not allow."""
    prefix = id_prefix(request.id)
    for output in request.outputs:
        if output.name not in model.outputs:
            raise Rejection(f"unexpected inference output '{output.name}' for model '{model.name}'")
    _check_count(model, tensors, prefix)
    _check_batch(model, tensors.values(), prefix)
    for tensor in tensors.values():
        _check_tensor(model, tensor, model.inputs[tensor.name], prefix)


def cut_string(model: Model, tensors: Iterable[Tensor]) -> str | None:
    """Return the error text for a string whose data ends too early; a model finds it when it reads its inputs."""
    for tensor in tensors:
        if tensor.datatype.numpy is not None or isinstance(tensor.data, list):
            continue
        for left, length in _starts(tensor.data):
            if length > left - BYTES_LENGTH_SIZE:
                name = QUESTIONS[tensor.name] if model.is_text else tensor.name
                text = (
                    f"incomplete string data for inference input '{name}', expecting string of length {length} but "
                    f"only {left - BYTES_LENGTH_SIZE} bytes available"
                )
                return f"in ensemble '{model.name}', {text}" if model.is_text else text
    return None


def _check_count(model: Model, tensors: dict[str, Tensor], prefix: str) -> None:
    missing = [name for name in model.required_inputs if name not in tensors]
    if len(model.required_inputs) <= len(tensors) <= len(model.inputs):
        return
    # Few entries of the server's hash table come out newest first.
    got = _listed(reversed(tensors))
    raise Rejection(
        f"{prefix}expected number of inputs between {len(model.required_inputs)} and {len(model.inputs)} but got "
        f"{len(tensors)} inputs for model '{model.name}'. Got input(s) {got}, but missing required "
        f"input(s) {_listed(missing)}. Please provide all required input(s)."
    )


def _check_batch(model: Model, tensors: Iterable[Tensor], prefix: str) -> None:
    batch = 0
    for tensor in tensors:
        if tensor.name not in model.inputs:
            raise Rejection(f"unexpected inference input '{tensor.name}' for model '{model.name}'")
        if not model.max_batch_size:
            continue
        if not tensor.shape:
            raise Rejection(
                f"{prefix}input '{tensor.name}' has no shape but model requires batch dimension for '{model.name}'"
            )
        batch = batch or tensor.shape[0]
        if tensor.shape[0] != batch:
            raise Rejection(f"{prefix}input '{tensor.name}' batch size does not match other inputs for '{model.name}'")
    if batch > model.max_batch_size:
        raise Rejection(f"{prefix}inference request batch-size must be <= {model.max_batch_size} for '{model.name}'")


def _check_tensor(model: Model, tensor: Tensor, spec: TensorSpec, prefix: str) -> None:
    if tensor.datatype.name != spec.datatype:
        raise Rejection(
            f"{prefix}inference input '{tensor.name}' data-type is '{tensor.datatype.name}', but model "
            f"'{model.name}' expects '{spec.datatype}'"
        )
    if any(size < 0 for size in tensor.shape):
        raise Rejection(
            f"{prefix}All input dimensions should be specified for input '{tensor.name}' for model "
            f"'{model.name}', got {_dims(tensor.shape)}"
        )
    batch, note = ((-1,), _BATCH_NOTE) if model.max_batch_size else ((), "")
    if not _fits(tensor.shape[len(batch) :], spec.dims):
        raise Rejection(
            f"{prefix}unexpected shape for input '{tensor.name}' for model '{model.name}'. Expected "
            f"{_dims((*batch, *spec.dims))}, got {_dims(tensor.shape)}. {note}"
        )
    _check_size(model, tensor, prefix)


def _check_size(model: Model, tensor: Tensor, prefix: str) -> None:
    elements = math.prod(tensor.shape)
    if model.max_batch_size and not tensor.shape[0]:
        # An empty batch is measured like one of one.
        elements = math.prod(tensor.shape[1:])
    if tensor.datatype.numpy is None:
        _check_strings(model, tensor, elements, prefix)
        return
    expected = elements * tensor.datatype.size_bytes
    if tensor.size_bytes != expected:
        raise Rejection(
            f"{prefix}input byte size mismatch for input '{tensor.name}' for model '{model.name}'. Expected "
            f"{expected}, got {tensor.size_bytes}"
        )


def _check_strings(model: Model, tensor: Tensor, elements: int, prefix: str) -> None:
    """Check the number of elements; whether the last one is complete is only seen by the model."""
    where = f"for inference input '{tensor.name}' for model '{model.name}'"
    found = 0
    lefts = (
        [BYTES_LENGTH_SIZE + len(element) for element in tensor.data]
        if isinstance(tensor.data, list)
        else (left for left, _ in _starts(tensor.data))
    )
    for left in lefts:
        if left < BYTES_LENGTH_SIZE:
            raise Rejection(
                f"{prefix}incomplete string length indicator {where}, expecting {BYTES_LENGTH_SIZE} bytes but only "
                f"{left} bytes available. Please make sure the string length indicator is in one buffer."
            )
        found += 1
        if found > elements:
            raise Rejection(f"{prefix}unexpected number of string elements {found} {where}, expecting {elements}")
    if found != elements:
        raise Rejection(f"{prefix}expected {elements} string elements {where}, got {found}")


def _starts(data: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """Yield for each string how much data there is from its beginning, and its length without the indicator."""
    at = 0
    while at < len(data):
        length = int.from_bytes(data[at : at + BYTES_LENGTH_SIZE], "little")
        yield len(data) - at, length
        at += BYTES_LENGTH_SIZE + length


def _fits(shape: tuple[int, ...], dims: tuple[int, ...]) -> bool:
    return len(shape) == len(dims) and all(want in (-1, size) for size, want in zip(shape, dims, strict=True))


def _dims(shape: tuple[int, ...]) -> str:
    return "[" + ",".join(str(size) for size in shape) + "]"


def _listed(names: Iterable[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"
