"""One inference request from message to responses, the same for unary calls and streams.

The steps and their refusals follow the server's order: model, front end, core, then the model itself.

The checks of Triton's core before a model sees a request, in its order and with its texts.

Source: `core/src/infer_request.cc`, InferenceRequest::Normalize. Where the server walks an unordered map, this walks
the inputs in the order of the request.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from sidecar.lab.engine.kserve.datatypes import BYTES_LENGTH_SIZE
from sidecar.lab.engine.kserve.driver import Executor
from sidecar.lab.engine.kserve.errors import Rejection, id_prefix
from sidecar.lab.engine.kserve.inference import Answer, Emit, Query
from sidecar.lab.engine.kserve.llmapi import inference_of
from sidecar.lab.engine.kserve.models import CORE, Model, TensorSpec
from sidecar.lab.engine.kserve.options import Options
from sidecar.lab.engine.kserve.shared_memory import Regions
from sidecar.lab.engine.kserve.steps import POSTPROCESSING, PREPROCESSING, QUESTIONS
from sidecar.lab.engine.kserve.tensors import Tensor, read_inputs
from sidecar.lab.engine.kserve.work import Parameter

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


class Answering:
    """Answers inference requests with one engine."""

    def __init__(self, models: dict[str, Model], driver: Executor, regions: Regions, options: Options) -> None:
        self._models = models
        self._regions = regions
        self._inference = inference_of(driver, options)
        self.statistics = {name: _no_statistics(name) for name in models}
        """Triton's statistics of each model."""

    def model(self, name: str, version: str = "") -> Model:
        """Return a model. Raises Rejection if there is none of this name and version."""
        if version and not _is_whole(version):
            raise Rejection(
                f"failed to get model version from specified version string '{version}' (details: stol), version "
                "should be an integral value > 0"
            )
        if name not in self._models:
            raise Rejection(f"Request for unknown model: '{name}' is not found", grpc.StatusCode.NOT_FOUND)
        if version not in ("", "1"):
            raise Rejection(
                f"Request for unknown model: '{name}' version {version} is not found",
                grpc.StatusCode.NOT_FOUND,
            )
        return self._models[name]

    async def answer(self, request: Any, emit: Emit) -> None:
        """Emit the responses to a request, the last one final. Raises Rejection before the first.

        Cancelling this cancels what the executor still runs for it.
        """
        began_ns = time.monotonic_ns()
        model = self.model(request.model_name, request.model_version)
        if model.is_step:
            raise Rejection(
                f"the emulated server runs '{model.name}' as a step of an ensemble only", grpc.StatusCode.UNIMPLEMENTED
            )
        inputs = read_inputs(request, self._regions)
        batch, run_ns = 1, began_ns

        async def counted(answer: Answer) -> None:
            self._count(model, answer, batch, (began_ns, run_ns, time.monotonic_ns()))
            await emit(answer)

        try:
            check_request(request, model, inputs.tensors)
            cut = cut_string(model, inputs.tensors.values())
            if cut is not None:
                await counted(Answer(None, cut, final=True, code=grpc.StatusCode.INVALID_ARGUMENT))
                return
            if model.max_batch_size:
                batch = next(iter(inputs.tensors.values())).shape[0]
            run_ns = time.monotonic_ns()
            requested = [output.name for output in request.outputs]
            query = Query(model, request.id, inputs.tensors, _parameters(request), requested)
            await self._inference.run(query, counted)
        finally:
            # A region is in use until the request's last response, as the backend holds its inputs until then.
            inputs.release()

    def _count(self, model: Model, answer: Answer, batch: int, times_ns: tuple[int, int, int]) -> None:
        """Count a response; a final one ends its request. An ensemble's counts for its steps, too."""
        succeeded, at_once = answer.error is None, times_ns[-1:] * 3
        if model.is_text and answer.values is not None:
            _note(self.statistics[POSTPROCESSING], True, batch, at_once)
        if model.is_text and answer.final:
            _note(self.statistics[PREPROCESSING], True, batch, at_once)
            _note(self.statistics[CORE], succeeded, batch, times_ns)
        if answer.final:
            _note(self.statistics[model.name], succeeded, batch, times_ns)


def _is_whole(version: str) -> bool:
    return version.lstrip("+-").isdecimal()


def _parameters(request: Any) -> dict[str, Parameter]:
    """Return the request's parameters as plain values."""
    values = {}
    for name, parameter in request.parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is not None:
            values[name] = getattr(parameter, kind)
    return values


def _no_statistics(name: str) -> Any:
    """Return a model's statistics before its first request, with a zero for each of its times, as Triton's."""
    statistics = service_pb2.ModelStatistics(name=name, version="1")
    for field in statistics.inference_stats.DESCRIPTOR.fields:
        getattr(statistics.inference_stats, field.name).SetInParent()
    return statistics


def _note(statistics: Any, succeeded: bool, batch: int, times_ns: tuple[int, int, int]) -> None:
    """Count a request in a model's statistics. The times are those of its arrival, the model's begin and its end.

    As in `ModelInstanceState::reportBaseMetrics` of the backend, every request is an execution of its own. The model's
    whole time counts as computing.
    """
    arrived_ns, began_ns, ended_ns = times_ns
    stats = statistics.inference_stats
    if not succeeded:
        _lengthen(stats.fail, ended_ns - arrived_ns)
        return
    statistics.inference_count += batch
    statistics.execution_count += 1
    statistics.last_inference = time.time_ns() // 1_000_000
    _lengthen(stats.success, ended_ns - arrived_ns)
    _lengthen(stats.queue, began_ns - arrived_ns)
    if not statistics.batch_stats:
        statistics.batch_stats.add(batch_size=1)
    for part in (stats, statistics.batch_stats[0]):
        _lengthen(part.compute_input, 0)
        _lengthen(part.compute_infer, ended_ns - began_ns)
        _lengthen(part.compute_output, 0)


def _lengthen(duration: Any, ns: int) -> None:
    duration.count += 1
    duration.ns += ns
