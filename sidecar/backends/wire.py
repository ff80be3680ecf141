"""KServe v2 messages as bytes: fragments to append to a client's request and to an engine's response.

A protobuf parser concatenates repeated fields, lets a later scalar win, and merges a message field that comes twice. So
an id, a task id or a response parameter is added by appending a small serialized fragment, and a client's tensors are
never parsed again.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.backends.faults import Wrote, nobody_wrote

ModelInferRequest = service_pb2.ModelInferRequest
ModelInferResponse = service_pb2.ModelInferResponse
ModelStreamInferResponse = service_pb2.ModelStreamInferResponse

CODES = {code.value[0]: code for code in grpc.StatusCode}
"""gRPC's statuses by number."""
_WIRE_CODES = frozenset(
    (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED, grpc.StatusCode.OK)
)
"""OK ends a stream before its answer is complete; CANCELLED, if we did not cancel, comes from a server that stops."""

_WIRE_TEXTS = ("RST_STREAM", "Internal error from Core")
"""Texts of gRPC's own INTERNAL errors: a reset stream, and a write to a call that had ended."""

SERVICE = "/inference.GRPCInferenceService"
TRITON_DATATYPES = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}
FINAL = "triton_final_response"
EMPTY_FINAL = "triton_enable_empty_final_response"
OWNER, EPOCH = "lora_owner", "lora_epoch"
MESSAGE_BYTES_MAX = 2**31 - 1
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Engines quote clients in their errors, and a status travels in the metadata.
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
    """Return the fragment for a client's request: our id, and the adapter's task id unless it is 0."""
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
    """Return the fragment for an engine's `ModelInferResponse`: the client's own id, and the answer's origin."""
    fragment = ModelInferResponse()
    set_parameters(fragment, parameters or {})
    # proto3 omits empty strings, but an empty id must be written or ours would stay.
    return _string_field(3, client_id) + bytes(fragment.SerializeToString())


def set_parameters(message: Any, parameters: Mapping[str, str | int | float]) -> None:
    """Set parameters of a request or a response, each by its type."""
    for name, value in parameters.items():
        field = message.parameters[name]
        if isinstance(value, str):
            field.string_param = value
        elif isinstance(value, int):
            field.int64_param = value
        else:
            field.double_param = value


def owner_parameters(owner: str, epoch: int) -> dict[str, str | int]:
    """Return parameters for an engine's log: the replica that sent a request, and its epoch as the engine's owner.

    Empty if there is only one replica: its epoch is 0.
    """
    return {OWNER: owner, EPOCH: epoch} if epoch else {}


@lru_cache(maxsize=256)
def owner_fragment(owner: str, epoch: int) -> bytes:
    """Return `owner_parameters` as a fragment for a client's request."""
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
    """Return True if a call was ended by its connection and not by the server."""
    if code is grpc.StatusCode.INTERNAL:
        return any(part in text and not wrote(part) for part in _WIRE_TEXTS)
    return code in _WIRE_CODES


def describe(error: grpc.RpcError) -> str:
    """Return an error's code and text for people."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)


def is_final(parameters: Any) -> bool:
    return FINAL in parameters and bool(parameters[FINAL].bool_param)


# `triton_final_response` in a serialized response, false and true.
_GOES_ON = FINAL.encode() + b"\x12\x02\x08\x00"
_ENDS = FINAL.encode() + b"\x12\x02\x08\x01"
_RESPONSE_FIRST = b"\x12"
"""First byte of a stream message with a response; one with an error begins with its text."""


def is_one_of_many(raw: bytes, id_written: bytes) -> bool:
    """Return True if a stream message is a token of this request, neither the last nor an error, without parsing it.

    Most messages are, and parsing takes a quarter of the time of passing one on, gRPC aside. Any doubt returns False
    and is parsed: a text may contain the bytes that are looked for, but an end or an error always has its own.
    """
    return raw[:1] == _RESPONSE_FIRST and _GOES_ON in raw and _ENDS not in raw and id_written in raw


def id_field(text: str) -> bytes:
    """Return a response's serialized `id`."""
    return _string_field(3, text)


def model_field(name: str) -> bytes:
    """Return a request's serialized `model_name`; appended, it replaces the one before."""
    return _string_field(1, name)


def output_tokens(response: Any) -> int:
    """Return the number of tokens in a response: the sum of `sequence_length`, or 1 if it does not say.

    Outputs in a client's own region have no content here: then the shape of `output_ids` is used.
    """
    outputs = response.outputs
    # Every message of a stream comes through here; a generator or an enumerate would be noticeable.
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
    """Add the rows' config and their weights: in a region, or without one as the last content, which must follow."""
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
    """Return the fragment that adds an adapter's weights to a client's request, to be appended after the task id.

    Without a region the weights must follow as the last content, and the request's own contents must be raw.
    """
    fragment = ModelInferRequest()
    add_weights(fragment, shape, dtype, config, region, size_bytes)
    if not raw:
        del fragment.raw_input_contents[:]
        fragment.inputs[0].contents.int_contents.extend(struct.unpack(f"<{len(config) // 4}i", config))
    return bytes(fragment.SerializeToString())


def content_head(size_bytes: int) -> bytes:
    """Return the bytes before one more raw content of this size."""
    return bytes([7 << 3 | 2]) + varint(size_bytes)


def load_head(model: str, request_id: str, parameters: Mapping[str, str | int] | None = None) -> Any:
    """Return a request of ours for the core model: one dummy token in, one out, its end reported in any case."""
    request = ModelInferRequest(model_name=model, id=request_id)
    request.parameters[EMPTY_FINAL].bool_param = True
    set_parameters(request, parameters or {})
    for tensor in ("input_ids", "input_lengths", "request_output_len"):
        request.inputs.add(name=tensor, datatype="INT32", shape=[1, 1])
        request.raw_input_contents.append(struct.pack("<i", 1))
    return request
