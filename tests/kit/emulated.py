"""Emulated engines for tests: in this process, or in a process that can be killed and restarted.

`start_engine(**options)` takes the fields of `sidecar.lab.engine.kserve.Options`; by default, time is not simulated
(every step takes as long as it computes). `EngineProcess` takes the options of `sidecar emulate`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidecar.backends.api import WEIGHTS_ID
from sidecar.lab.engine.kserve import Options, Server, serve
from sidecar.lab.engine.kserve.served import Served
from sidecar.lab.engine.kserve.server import MESSAGE_BYTES_MAX
from sidecar.lab.engine.rounding import narrow
from sidecar.lab.engine.shape import SHAPES, module_dims
from sidecar.lab.engine.tokens import ByteTokenizer
from tests.kit.engine_process import EmulatorProcess
from tests.kit.ports import free_port

CORE, ENSEMBLE = "tensorrt_llm", "ensemble"


async def start_engine(**options: Any) -> Server:
    """Start an emulated server in this event loop; the caller stops it."""
    return await serve(Options(**({"time_scale": 0.0, "metrics_port": None, "grpc_port": free_port()} | options)))


@asynccontextmanager
async def running_engine(**options: Any) -> AsyncIterator[Server]:
    """Run an emulated server for the length of a block."""
    server = await start_engine(**options)
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def channel_to(address: str) -> AsyncIterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    """Yield a stub of the raw service, for tests of the messages themselves."""
    options = [
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


async def regions_of(engine: Any) -> set[str]:
    """Return the names of the shared-memory regions registered at a server."""
    async with channel_to(engine.grpc_address) as stub:
        reply = await stub.SystemSharedMemoryStatus(service_pb2.SystemSharedMemoryStatusRequest())
        return set(reply.regions)


class EngineProcess(EmulatorProcess):
    """An emulated Triton in a process of its own."""

    def __init__(self, *arguments: str, time_scale: float = 0.0, grpc_port: int = 0) -> None:
        super().__init__(*arguments, "--time-scale", str(time_scale), grpc=grpc_port, metrics=0)

    @property
    def grpc_address(self) -> str:
        """Host and port of the gRPC service."""
        return self.address("grpc")

    @property
    def metrics_address(self) -> str:
        """Host and port of the metrics."""
        return self.address("metrics")


def read_served(path: Path, check: bool = False) -> list[dict[str, Any]]:
    """Return the lines of a served log: one for each ended executor request, in that order.

    What `weights_check` asked at a Triton is among them only if so asked (`check`).
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if check or line["request_id"] != WEIGHTS_ID]


def clients_asked(server: Server) -> list[Served]:
    """Return how the last executor requests of a Triton ended, without what `weights_check` asked."""
    return [one for one in server.served if one.request_id != WEIGHTS_ID]


def random_adapter(
    seed: int,
    modules: Sequence[str] = ("attn_q", "attn_v"),
    rank: int = 8,
    shape: str = "tiny",
    scale: float = 0.5,
    dtype: str = "float16",
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return packed rows [N, W] (bfloat16 as uint16 bits) and their config [N, 3]; another seed, another adapter."""
    random = np.random.default_rng(seed)
    dims = module_dims(SHAPES[shape])
    layers = range(SHAPES[shape].layers)
    width = max(rank * (dims[name].in_dim + dims[name].out_dim) for name in modules)
    config = [[dims[name].module_id, layer, rank] for layer in layers for name in modules]
    weights = np.zeros((len(config), width), np.float32)
    for row, (_, name) in zip(weights, [(layer, name) for layer in layers for name in modules], strict=True):
        used = rank * (dims[name].in_dim + dims[name].out_dim)
        row[:used] = random.normal(0.0, scale, used)
    return narrow(weights, dtype), np.array(config, np.int32)


def set_parameter(message: Any, name: str, value: bool | int | str) -> None:
    """Set a request parameter."""
    kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
    setattr(message.parameters[name], kind, value)


def add_tensor(request: Any, name: str, datatype: str, array: np.ndarray[Any, Any]) -> None:
    """Add an input by raw bytes; `array` has the wire shape."""
    request.inputs.add(name=name, datatype=datatype, shape=array.shape)
    request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())


def add_lora(
    request: Any,
    task_id: int,
    adapter: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None,
    datatype: str = "FP16",
) -> Any:
    """Add a task id, and weights and config if given; return the request."""
    add_tensor(request, "lora_task_id", "UINT64", np.array([[task_id]], np.uint64))
    if adapter is not None:
        add_tensor(request, "lora_weights", datatype, adapter[0][np.newaxis])
        add_tensor(request, "lora_config", "INT32", adapter[1][np.newaxis])
    return request


def core_request(
    prompt: str = "hello",
    tokens: int = 8,
    *,
    streaming: bool = False,
    request_id: str = "r1",
    exclude_input: bool = True,
    **parameters: bool | int | str,
) -> Any:
    """Return a ModelInferRequest for `tensorrt_llm`."""
    request = service_pb2.ModelInferRequest(model_name=CORE, id=request_id)
    ids = ByteTokenizer().encode(prompt)
    add_tensor(request, "input_ids", "INT32", np.array([ids], np.int32))
    add_tensor(request, "input_lengths", "INT32", np.array([[len(ids)]], np.int32))
    add_tensor(request, "request_output_len", "INT32", np.array([[tokens]], np.int32))
    add_tensor(request, "streaming", "BOOL", np.array([[streaming]]))
    add_tensor(request, "exclude_input_in_output", "BOOL", np.array([[exclude_input]]))
    for name, value in parameters.items():
        set_parameter(request, name, value)
    return request


def text_request(
    prompt: str = "hello",
    tokens: int = 8,
    *,
    streaming: bool = False,
    request_id: str = "r1",
    exclude_input: bool = True,
    **parameters: bool | int | str,
) -> Any:
    """Return a ModelInferRequest for `ensemble`."""
    request = service_pb2.ModelInferRequest(model_name=ENSEMBLE, id=request_id)
    text = prompt.encode()
    request.inputs.add(name="text_input", datatype="BYTES", shape=(1, 1))
    request.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
    add_tensor(request, "max_tokens", "INT32", np.array([[tokens]], np.int32))
    add_tensor(request, "stream", "BOOL", np.array([[streaming]]))
    add_tensor(request, "exclude_input_in_output", "BOOL", np.array([[exclude_input]]))
    for name, value in parameters.items():
        set_parameter(request, name, value)
    return request


async def stream_answers(stub: Any, *requests: Any) -> list[Any]:
    """Send the requests on one stream, close it, and return all ModelStreamInferResponses."""
    call = stub.ModelStreamInfer()
    for request in requests:
        await call.write(request)
    await call.done_writing()
    return [message async for message in call]


def output_of(response: Any, name: str, dtype: Any = np.int32) -> np.ndarray[Any, Any]:
    """Return an output of a ModelInferResponse in its wire shape."""
    index = [output.name for output in response.outputs].index(name)
    return np.frombuffer(response.raw_output_contents[index], dtype).reshape(response.outputs[index].shape)


def tokens_of(messages: Sequence[Any]) -> list[int]:
    """Return the tokens of a stream's data responses, in order; fails on an error message."""
    tokens: list[int] = []
    for message in messages:
        assert not message.error_message, message.error_message
        tokens.extend(output_of(message.infer_response, "output_ids").reshape(-1).tolist())
    return tokens


def text_of(response: Any) -> str:
    """Return the text_output of an ensemble's ModelInferResponse."""
    index = [output.name for output in response.outputs].index("text_output")
    return bytes(response.raw_output_contents[index][4:]).decode()


def is_final(message: Any) -> bool:
    """Return True if a stream message's final flag is set."""
    return bool(message.infer_response.parameters["triton_final_response"].bool_param)
