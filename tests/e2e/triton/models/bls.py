"""The model `tensorrt_llm_bls`: the three steps of `ensemble` called from Python, one request at a time.

As NVIDIA's does, it passes LoRA tensors on as arrays, ends a decoupled answer with an empty final response, and gives
the whole traceback for an error.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from sidecar.lab.engine.kserve.models import CORE
from sidecar.lab.engine.kserve.steps import CORE_INPUTS, QUESTIONS, STEPS
from tests.e2e.triton.models.settings import Settings


class TritonPythonModel:
    """One instance; it is busy until its request has ended."""

    def initialize(self, args: dict[str, str]) -> None:
        """Learn which model to ask and how."""
        options = Settings.read(args).engine_options()
        self._decoupled = options.decoupled

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer by senders when decoupled, else by the list."""
        if self._decoupled:
            for request in requests:
                self._stream(request)
            return None
        return [self._whole(request) for request in requests]

    def _stream(self, request: Any) -> None:
        sender = request.get_response_sender()
        try:
            for response in self._responses(request):
                sender.send(response)
        except Exception:  # noqa: BLE001 - the client is told, as by NVIDIA's model
            sender.send(_failed())
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _whole(self, request: Any) -> Any:
        try:
            (response,) = self._responses(request)
        except Exception:  # noqa: BLE001 - the client is told, as by NVIDIA's model
            return _failed()
        return response

    def _responses(self, request: Any) -> Iterator[Any]:
        prepared = _call("preprocessing", _renamed(request.inputs(), QUESTIONS), tuple(STEPS))
        inputs = [*_renamed(prepared, STEPS), *_renamed(request.inputs(), CORE_INPUTS)]
        wanted = set(request.requested_output_names())
        for outputs in self._generated(request, inputs, wanted):
            named = {tensor.name(): tensor for tensor in outputs}
            tokens = [
                pb_utils.Tensor("TOKENS_BATCH", named.pop("output_ids").as_numpy()),
                pb_utils.Tensor("SEQUENCE_LENGTH", named.pop("sequence_length").as_numpy()),
            ]
            (text,) = _call("postprocessing", tokens, ("OUTPUT",))
            yield pb_utils.InferenceResponse([pb_utils.Tensor("text_output", text.as_numpy()), *named.values()])

    def _generated(self, request: Any, inputs: list[Any], wanted: set[str]) -> Iterator[list[Any]]:
        """Yield the output tensors of each response of the core model that has any."""
        asked = pb_utils.InferenceRequest(
            model_name=CORE,
            request_id=request.request_id(),
            inputs=inputs,
            requested_output_names=["output_ids", "sequence_length", *sorted(wanted - {"text_output"})],
        )
        replies = asked.exec(decoupled=True) if self._decoupled else [asked.exec()]
        for reply in replies:
            tensors = _checked(reply)
            if tensors:
                yield tensors


def _call(model: str, inputs: list[Any], outputs: tuple[str, ...]) -> list[Any]:
    asked = pb_utils.InferenceRequest(model_name=model, inputs=inputs, requested_output_names=list(outputs))
    return _checked(asked.exec())


def _checked(reply: Any) -> list[Any]:
    if reply.has_error():
        raise pb_utils.TritonModelException(reply.error().message())
    tensors: list[Any] = reply.output_tensors()
    return tensors


def _renamed(tensors: Sequence[Any], names: dict[str, str]) -> list[Any]:
    """Return those tensors that have another name there, as arrays under it; a BF16 one cannot be one, and raises."""
    return [
        pb_utils.Tensor(names[tensor.name()], np.asarray(tensor.as_numpy()))
        for tensor in tensors
        if tensor.name() in names
    ]


def _failed() -> Any:
    text = traceback.format_exc()
    pb_utils.Logger.log_error(text)
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(text))
