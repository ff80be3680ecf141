"""One inference request from message to responses, the same for unary calls and streams.

The steps and their refusals follow the server's order: model, front end, core, then the model itself.
"""

from __future__ import annotations

import time
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from sidecar.lab.engine.kserve.core_checks import check_request, cut_string
from sidecar.lab.engine.kserve.driver import Executor
from sidecar.lab.engine.kserve.errors import Rejection
from sidecar.lab.engine.kserve.inference import Answer, Emit, Query
from sidecar.lab.engine.kserve.llmapi import inference_of
from sidecar.lab.engine.kserve.models import CORE, Model
from sidecar.lab.engine.kserve.options import Options
from sidecar.lab.engine.kserve.shared_memory import Regions
from sidecar.lab.engine.kserve.steps import POSTPROCESSING, PREPROCESSING
from sidecar.lab.engine.kserve.tensors import read_inputs
from sidecar.lab.engine.kserve.work import Parameter


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
