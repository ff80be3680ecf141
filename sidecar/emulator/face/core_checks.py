"""What Triton's core checks before a model sees a request, in its order and with its texts.

Source: `core/src/infer_request.cc`, InferenceRequest::Normalize. Where the server walks an unordered map,
this walks the inputs in the order of the request.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sidecar.emulator.face.datatypes import split_bytes
from sidecar.emulator.face.errors import Rejection
from sidecar.emulator.face.models import Model, TensorSpec
from sidecar.emulator.face.tensors import Tensor

UNKNOWN_ID = "<id_unknown>"
_BATCH_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try "
    "setting max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)


def check_request(request: Any, model: Model, tensors: dict[str, Tensor]) -> None:
    """Raise Rejection for the first thing about the request that the model's config does not allow."""
    prefix = f"[request id: {request.id or UNKNOWN_ID}] "
    for output in request.outputs:
        if output.name not in model.outputs:
            raise Rejection(f"unexpected inference output '{output.name}' for model '{model.name}'")
    _check_count(model, tensors, prefix)
    _check_batch(model, tensors.values(), prefix)
    for tensor in tensors.values():
        _check_tensor(model, tensor, model.inputs[tensor.name], prefix)


def _check_count(model: Model, tensors: dict[str, Tensor], prefix: str) -> None:
    missing = [name for name in model.required_inputs if name not in tensors]
    if len(model.required_inputs) <= len(tensors) <= len(model.inputs):
        return
    raise Rejection(
        f"{prefix}expected number of inputs between {len(model.required_inputs)} and {len(model.inputs)} but got "
        f"{len(tensors)} inputs for model '{model.name}'. Got input(s) {_listed(tensors)}, but missing required "
        f"input(s) {_listed(missing)}. Please provide all required input(s)."
    )


def _check_batch(model: Model, tensors: Iterable[Tensor], prefix: str) -> None:
    batch = 0
    for tensor in tensors:
        if tensor.name not in model.inputs:
            raise Rejection(f"unexpected inference input '{tensor.name}' for model '{model.name}'")
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
    if not _fits(tensor.shape[1:], spec.dims):
        raise Rejection(
            f"{prefix}unexpected shape for input '{tensor.name}' for model '{model.name}'. Expected "
            f"{_dims((-1, *spec.dims))}, got {_dims(tensor.shape)}. {_BATCH_NOTE}"
        )
    _check_size(model, tensor, prefix)


def _check_size(model: Model, tensor: Tensor, prefix: str) -> None:
    elements = 1
    for size in tensor.shape:
        elements *= size
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
    try:
        found = len(tensor.data if isinstance(tensor.data, list) else split_bytes(tensor.data))
    except ValueError as error:
        raise Rejection(
            f"{prefix}incomplete string data for inference input '{tensor.name}' for model '{model.name}'"
        ) from error
    if found != elements:
        raise Rejection(
            f"{prefix}expected {elements} string elements for inference input '{tensor.name}' for model "
            f"'{model.name}', got {found}"
        )


def _fits(shape: tuple[int, ...], dims: tuple[int, ...]) -> bool:
    return len(shape) == len(dims) and all(want in (-1, size) for size, want in zip(shape, dims, strict=True))


def _dims(shape: tuple[int, ...]) -> str:
    return "[" + ",".join(str(size) for size in shape) + "]"


def _listed(names: Iterable[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"
