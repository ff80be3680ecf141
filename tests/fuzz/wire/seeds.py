"""Good messages to begin with: requests to each kind of model in each form that there is, and admin calls."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from tests.fuzz.wire.trees import Field, Tree, message, number, text
from tests.kit.protobuf_wire import FIXED32, varint

NAMES = ("sql", "sql@v1", "chat", "")
"""The adapters that a guest may use, and the base model."""


@dataclass(frozen=True)
class Tensor:
    """An input: its name, its datatype, its shape, its bytes, and the field that typed contents have."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes
    typed: Field


def integers(name: str, *values: int, batch: bool = True) -> Tensor:
    packed = b"".join(varint(value) for value in values)
    data = struct.pack(f"<{len(values)}i", *values)
    return Tensor(name, "INT32", (1, len(values)) if batch else (len(values),), data, text(2, packed))


def flag(name: str, value: bool, batch: bool = True) -> Tensor:
    return Tensor(name, "BOOL", (1, 1) if batch else (1,), bytes([value]), text(1, bytes([value])))


def words(name: str, value: str, batch: bool = True) -> Tensor:
    raw = value.encode()
    return Tensor(name, "BYTES", (1, 1) if batch else (1,), struct.pack("<I", len(raw)) + raw, text(8, raw))


def core(stream: bool) -> list[Tensor]:
    return [
        integers("input_ids", 1, 2, 3),
        integers("input_lengths", 3),
        integers("request_output_len", 2),
        flag("streaming", stream),
        flag("exclude_input_in_output", True),
    ]


def ensemble(stream: bool) -> list[Tensor]:
    return [
        words("text_input", "hello"),
        integers("max_tokens", 2),
        flag("stream", stream),
        flag("exclude_input_in_output", True),
    ]


def llmapi(stream: bool) -> list[Tensor]:
    return [
        words("text_input", "hello", batch=False),
        integers("sampling_param_max_tokens", 2, batch=False),
        flag("streaming", stream, batch=False),
        flag("sampling_param_exclude_input_from_output", True, batch=False),
    ]


def input_of(tensor: Tensor, typed: bool, *more: Field) -> Field:
    fields = [
        text(1, tensor.name),
        text(2, tensor.datatype),
        text(3, b"".join(varint(size) for size in tensor.shape)),
        *more,
    ]
    return message(5, *fields, *([message(5, tensor.typed)] if typed else []))


def parameter(name: str | bytes, value: str | int, place: int = 4) -> Field:
    chosen = text(3, value) if isinstance(value, str) else number(2, value)
    return message(place, text(1, name), message(2, chosen))


def infer(generator: random.Random, model: str, tensors: list[Tensor], name: str) -> Tree:
    """A ModelInferRequest; which form it has is drawn."""
    typed = generator.random() < 0.3
    fields = [text(1, model)]
    if generator.random() < 0.5:
        fields.append(text(3, f"r{generator.randrange(100)}"))
    if name:
        fields.append(parameter("lora_name", name))
    fields += [input_of(tensor, typed) for tensor in tensors]
    if not typed:
        fields += [text(7, tensor.data) for tensor in tensors]
    return Tree(fields)


def generate(generator: random.Random, name: str) -> Tree:
    """A GenerateRequest of lorasidecar.v1."""
    prompt = text(2, "hello") if generator.random() < 0.5 else message(3, text(1, b"\1\2\3"))
    fields = [text(1, name), prompt, number(4, 2)]
    if generator.random() < 0.3:
        fields += [Field(6, FIXED32, struct.pack("<f", 0.5)), number(7, 3), text(19, "mine")]
    return Tree(fields)


ADMIN: dict[str, Tree] = {
    "/lorasidecar.v1.Adapters/Register": Tree([text(1, "extra"), text(2, "/nowhere/extra")]),
    "/lorasidecar.v1.Adapters/Get": Tree([text(1, "sql")]),
    "/lorasidecar.v1.Adapters/List": Tree([]),
    "/lorasidecar.v1.Backends/Get": Tree([text(1, "trt-0")]),
    "/lorasidecar.v1.Queues/Get": Tree([text(1, "sql"), number(3, 10)]),
    "/inference.GRPCInferenceService/RepositoryIndex": Tree([text(1, "x")]),
    "/grpc.health.v1.Health/Check": Tree([text(1, "")]),
}
"""Calls that change nothing of what the others are answered by."""
