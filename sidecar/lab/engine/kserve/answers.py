"""One inference request from message to responses, the same for unary calls and streams.

The steps and their refusals follow the server's order: model, front end, core, then the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from sidecar.lab.engine.kserve.core_checks import check_request, cut_string
from sidecar.lab.engine.kserve.driver import Executor
from sidecar.lab.engine.kserve.errors import Rejection
from sidecar.lab.engine.kserve.inference import Answer, Emit, Query
from sidecar.lab.engine.kserve.llmapi import inference_of
from sidecar.lab.engine.kserve.models import Model
from sidecar.lab.engine.kserve.options import Options
from sidecar.lab.engine.kserve.shared_memory import Regions
from sidecar.lab.engine.kserve.tensors import read_inputs
from sidecar.lab.engine.kserve.work import Parameter


class Answering:
    """Answers inference requests with one engine."""

    def __init__(self, models: dict[str, Model], driver: Executor, regions: Regions, options: Options) -> None:
        self._models = models
        self._regions = regions
        self._inference = inference_of(driver, options)
        self.statistics = {name: Statistics() for name in models}

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
        model = self.model(request.model_name, request.model_version)
        inputs = read_inputs(request, self._regions)

        async def counted(answer: Answer) -> None:
            self.statistics[model.name].count(answer.error is None, answer.final)
            await emit(answer)

        try:
            check_request(request, model, inputs.tensors)
            cut = cut_string(model, inputs.tensors.values())
            if cut is not None:
                await counted(Answer(None, cut, final=True, code=grpc.StatusCode.INVALID_ARGUMENT))
                return
            requested = [output.name for output in request.outputs]
            query = Query(model, request.id, inputs.tensors, _parameters(request), requested)
            await self._inference.run(query, counted)
        finally:
            # A region is in use until the request's last response, as the backend holds its inputs until then.
            inputs.release()


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


@dataclass
class Statistics:
    """Counts of requests that ended well and badly, and of responses."""

    succeeded: int = 0
    failed: int = 0
    responses: int = 0

    def count(self, succeeded: bool, final: bool) -> None:
        """Note one response; a final one ends its request."""
        self.responses += 1
        if final and succeeded:
            self.succeeded += 1
        elif final:
            self.failed += 1
