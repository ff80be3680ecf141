"""KServe v2 messages as bytes: what is appended to a client's request and to an engine's response.

A protobuf parser joins repeated fields that come in pieces, lets a later scalar win and merges a message field that
comes twice. So an id, a task id or a response parameter is added by appending a small serialized fragment, and a
client's tensors are never parsed again.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from sidecar.backends.faults import Wrote, nobody_wrote

ModelInferRequest = service_pb2.ModelInferRequest
ModelInferResponse = service_pb2.ModelInferResponse
ModelStreamInferResponse = service_pb2.ModelStreamInferResponse

_WIRE_CODES = frozenset(
    (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED, grpc.StatusCode.OK)
)
"""OK ends a stream before its answer is complete; CANCELLED is a server that goes away, where we did not cancel."""

_WIRE_TEXTS = ("RST_STREAM", "Internal error from Core")
"""INTERNAL in gRPC's own words: a reset stream, and a write that met a call already ended."""

SERVICE = "/inference.GRPCInferenceService"
TRITON_DATATYPES = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}
FINAL = "triton_final_response"
EMPTY_FINAL = "triton_enable_empty_final_response"
OWNER, EPOCH = "lora_owner", "lora_epoch"
MESSAGE_BYTES_MAX = 2**31 - 1
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # An engine quotes its client in its errors, and a status travels in the metadata.
    ("grpc.max_metadata_size", 1 << 20),
    ("grpc.absolute_max_metadata_size", 1 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


def engine_id(request: int, attempt: int) -> str:
    """Return the id that the engine sees: clients' ids may collide, ours do not."""
    return f"{request}.{attempt}"


def request_fragment(request_id: str, task_id: int, raw: bool, stream: bool) -> bytes:
    """Return what makes a client's request ours: our id, and the adapter's task id unless it is 0."""
    fragment = ModelInferRequest(id=request_id)
    if stream:
        fragment.parameters[EMPTY_FINAL].bool_param = True
    if task_id:
        tensor = fragment.inputs.add(name="lora_task_id", datatype="UINT64", shape=[1, 1])
        if raw:
            fragment.raw_input_contents.append(struct.pack("<Q", task_id))
        else:
            tensor.contents.uint64_contents.append(task_id)
    return bytes(fragment.SerializeToString())


def response_fragment(client_id: str, parameters: Mapping[str, str | int | float] | None = None) -> bytes:
    """Return what makes an engine's `ModelInferResponse` the client's: its own id back, and where it came from."""
    fragment = ModelInferResponse()
    set_parameters(fragment, parameters or {})
    # An empty id has to be written out too, or ours would stay; proto3 leaves empty strings away.
    return _string_field(3, client_id) + bytes(fragment.SerializeToString())


def set_parameters(message: Any, parameters: Mapping[str, str | int | float]) -> None:
    """Set parameters of a request or a response, each as what it is."""
    for name, value in parameters.items():
        field = message.parameters[name]
        if isinstance(value, str):
            field.string_param = value
        elif isinstance(value, int):
            field.int64_param = value
        else:
            field.double_param = value


def owner_parameters(owner: str, epoch: int) -> dict[str, str | int]:
    """Return what tells an engine's log which replica sent a request and under which epoch it owned the engine.

    Nothing where there is one replica only: its epoch is 0.
    """
    return {OWNER: owner, EPOCH: epoch} if epoch else {}


@lru_cache(maxsize=256)
def owner_fragment(owner: str, epoch: int) -> bytes:
    """Return `owner_parameters` as they are appended to a client's request."""
    fragment = ModelInferRequest()
    set_parameters(fragment, owner_parameters(owner, epoch))
    return bytes(fragment.SerializeToString())


def in_stream_response(fragment: bytes) -> bytes:
    """Wrap a response fragment as field `infer_response` of `ModelStreamInferResponse`."""
    return _bytes_field(2, fragment)


def _string_field(number: int, text: str) -> bytes:
    return _bytes_field(number, text.encode())


def _bytes_field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(data)) + data


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def is_lost(code: grpc.StatusCode, text: str, wrote: Wrote = nobody_wrote) -> bool:
    """Whether a call was ended by its wire rather than by the server's word."""
    if code is grpc.StatusCode.INTERNAL:
        return any(part in text and not wrote(part) for part in _WIRE_TEXTS)
    return code in _WIRE_CODES


def is_final(parameters: Any) -> bool:
    return FINAL in parameters and bool(parameters[FINAL].bool_param)


# `triton_final_response` as it stands in a serialized response, false and true.
_GOES_ON = FINAL.encode() + b"\x12\x02\x08\x00"
_ENDS = FINAL.encode() + b"\x12\x02\x08\x01"
_RESPONSE_FIRST = b"\x12"
"""A stream message begins with the response; one with an error begins with its text."""


def is_one_of_many(raw: bytes, id_written: bytes) -> bool:
    """Whether a stream message is a token of this request, neither its last nor an error, without parsing it.

    Most messages are, and parsing is a quarter of what passing one on costs beside gRPC itself. Anything in doubt says
    no and is parsed: a text may contain the bytes that are looked for, but an end or an error always has its own.
    """
    return raw[:1] == _RESPONSE_FIRST and _GOES_ON in raw and _ENDS not in raw and id_written in raw


def id_field(text: str) -> bytes:
    """Return a response's `id` as it is serialized."""
    return _string_field(3, text)


def model_field(name: str) -> bytes:
    """Return a request's `model_name` as it is serialized: appended, it stands for the one before."""
    return _string_field(1, name)


def output_tokens(response: Any) -> int:
    """Return how many tokens a response carries: `sequence_length` summed, 1 for a response that does not say.

    What lies in a region of the client's own has no content here: then the shape of `output_ids` says it.
    """
    outputs = response.outputs
    # Every message of a stream comes through here, and a generator or an enumerate would show.
    for output, data in zip(outputs, response.raw_output_contents, strict=False):
        if output.name == "sequence_length" and data:
            lengths: tuple[int, ...] = struct.unpack_from(f"<{len(data) // 4}i", data)
            return max(1, sum(lengths))
    for output in outputs:
        if output.name == "output_ids":
            return max(1, int(math.prod(output.shape)))
    return 1 if outputs else 0


def add_weights(
    request: Any, shape: tuple[int, int], dtype: str, config: bytes, region: str | None, size_bytes: int
) -> None:
    """Add the rows' config and their weights: those of a region, or, where there is none, the last content to come."""
    rows, width = shape
    request.inputs.add(name="lora_config", datatype="INT32", shape=[1, rows, 3])
    request.raw_input_contents.append(config)
    weights = request.inputs.add(name="lora_weights", datatype=TRITON_DATATYPES[dtype], shape=[1, rows, width])
    if region is not None:
        weights.parameters["shared_memory_region"].string_param = region
        weights.parameters["shared_memory_byte_size"].int64_param = size_bytes


def attached(
    shape: tuple[int, int], dtype: str, config: bytes, region: str | None, size_bytes: int, raw: bool
) -> bytes:
    """Return what makes a client's request bring its adapter along; to be appended after the task id.

    Where no region is named the weights are the last content to come, and the request's own contents must be raw.
    """
    fragment = ModelInferRequest()
    add_weights(fragment, shape, dtype, config, region, size_bytes)
    if not raw:
        del fragment.raw_input_contents[:]
        fragment.inputs[0].contents.int_contents.extend(struct.unpack(f"<{len(config) // 4}i", config))
    return bytes(fragment.SerializeToString())


def content_head(size_bytes: int) -> bytes:
    """Return what stands before one more raw content of so many bytes."""
    return bytes([7 << 3 | 2]) + varint(size_bytes)


def load_head(model: str, request_id: str, parameters: Mapping[str, str | int] | None = None) -> Any:
    """Return a request of ours for the core model: one dummy token in, one out, its end told in any case."""
    request = ModelInferRequest(model_name=model, id=request_id)
    request.parameters[EMPTY_FINAL].bool_param = True
    set_parameters(request, parameters or {})
    for tensor in ("input_ids", "input_lengths", "request_output_len"):
        request.inputs.add(name=tensor, datatype="INT32", shape=[1, 1])
        request.raw_input_contents.append(struct.pack("<i", 1))
    return request
