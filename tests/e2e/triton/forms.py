"""The messages of a Triton server as they are on the wire, and requests that bring them about."""

from __future__ import annotations

import re
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from sidecar.lab.engine.kserve.compute import dummy_token
from tests.kit.emulated import add_tensor, core_request, random_adapter


def rejected(text: str, request_id: str = "r1") -> Any:
    """What a core rejection is on a stream: a message and the id, nothing else."""
    return pb.ModelStreamInferResponse(error_message=text, infer_response=pb.ModelInferResponse(id=request_id))


def failed(text: str, model: str = "tensorrt_llm", request_id: str = "r1") -> Any:
    """What a backend error is on a stream: also the model's name and the final flag."""
    message = pb.ModelStreamInferResponse(
        error_message=text, infer_response=pb.ModelInferResponse(id=request_id, model_name=model)
    )
    message.infer_response.parameters["triton_final_response"].bool_param = True
    return message


def data(tokens: list[int], final: bool | None, request_id: str = "r1") -> Any:
    """What a response with tokens is; `final` None for a unary one, which has no flag."""
    response = pb.ModelInferResponse(model_name="tensorrt_llm", model_version="1", id=request_id)
    response.outputs.add(name="output_ids", datatype="INT32", shape=(1, 1, len(tokens)))
    response.outputs.add(name="sequence_length", datatype="INT32", shape=(1, 1))
    response.raw_output_contents.append(np.array(tokens, np.int32).tobytes())
    response.raw_output_contents.append(np.array([len(tokens)], np.int32).tobytes())
    if final is None:
        return response
    response.parameters["triton_final_response"].bool_param = final
    return pb.ModelStreamInferResponse(infer_response=response)


def text_data(text: str, final: bool | None) -> Any:
    """What a response of the ensemble is; it carries the request's sequence, which is none."""
    response = pb.ModelInferResponse(model_name="ensemble", model_version="1", id="r1")
    response.outputs.add(name="text_output", datatype="BYTES", shape=(1,))
    response.raw_output_contents.append(len(text).to_bytes(4, "little") + text.encode())
    response.parameters["sequence_id"].int64_param = 0
    response.parameters["sequence_start"].bool_param = False
    response.parameters["sequence_end"].bool_param = False
    if final is None:
        return response
    response.parameters["triton_final_response"].bool_param = final
    return pb.ModelStreamInferResponse(infer_response=response)


def empty_final(request_id: str = "r1") -> Any:
    """What an empty final response is."""
    message = pb.ModelStreamInferResponse(
        infer_response=pb.ModelInferResponse(id=request_id, model_name="tensorrt_llm")
    )
    message.infer_response.parameters["triton_final_response"].bool_param = True
    return message


def executor(text: str) -> str:
    """The executor's text as the backend passes it on; its number of the request is not told in advance."""
    return f"Executor failed process requestId # due to the following error: {text}"


def unnumbered(message: Any) -> Any:
    """A message with the executor's number of the request taken out."""
    copy = type(message)()
    copy.CopyFrom(message)
    copy.error_message = re.sub(r"requestId \d+ ", "requestId # ", message.error_message)
    return copy


async def unary_error(stub: Any, request: Any) -> tuple[grpc.StatusCode, str]:
    """Return the code and the text that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.ModelInfer(request)
    return error.value.code(), re.sub(r"requestId \d+ ", "requestId # ", error.value.details() or "")


def base_tokens(count: int) -> list[int]:
    return [dummy_token(0, position) for position in range(count)]


def adapter_tokens(task_id: int, count: int) -> list[int]:
    return [dummy_token(task_id, position) for position in range(count)]


def miss(task_id: int) -> str:
    return f"LoRA task {task_id} not found in cache. Please send LoRA weights with request"


def add_config(request: Any) -> Any:
    add_tensor(request, "lora_config", "INT32", random_adapter(1)[1][np.newaxis])
    return request


def without(request: Any, index: int) -> Any:
    del request.inputs[index], request.raw_input_contents[index]
    return request


def asking_for(request: Any, *names: str) -> Any:
    for name in names:
        request.outputs.add(name=name)
    return request


def stopping(request_id: str) -> Any:
    request = core_request(tokens=1, request_id=request_id)
    add_tensor(request, "stop", "BOOL", np.array([[True]]))
    return request
