"""How many tokens messages carry, wherever their tensors lie: in the message, typed, or in a client's shared memory."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from sidecar.backends.wire import output_tokens
from sidecar.fronts.kserve.structure import structure_of
from sidecar.fronts.kserve.tensors import Tensors


def answer(*outputs: tuple[str, tuple[int, ...], bytes]) -> Any:
    message = service_pb2.ModelInferResponse()
    for name, shape, data in outputs:
        message.outputs.add(name=name, datatype="INT32", shape=shape)
        message.raw_output_contents.append(data)
    return message


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


@pytest.mark.parametrize(
    ("outputs", "tokens"),
    [
        ([("output_ids", (1, 1, 3), numbers(7, 8, 9)), ("sequence_length", (1, 1), numbers(3))], 3),
        ([("output_ids", (1, 1, 8), numbers(*range(8))), ("sequence_length", (1, 1), numbers(5))], 5),
        ([("output_ids", (1, 2, 4), numbers(*range(8))), ("sequence_length", (1, 2), numbers(4, 3))], 7),
        ([("output_ids", (1, 1, 3), b""), ("sequence_length", (1, 1), numbers(3))], 3),
        ([("output_ids", (1, 1, 3), numbers(7, 8, 9)), ("sequence_length", (1, 1), b"")], 3),
        ([("output_ids", (1, 1, 12), b""), ("sequence_length", (1, 1), b"")], 12),
        ([("output_ids", (1, 1, 0), b""), ("sequence_length", (1, 1), b"")], 1),
        ([("text_output", (1,), b"\x01\0\0\0a")], 1),
        ([], 0),
    ],
)
def test_tokens_of_an_answer(outputs: list[tuple[str, tuple[int, ...], bytes]], tokens: int) -> None:
    """The lengths count where they can be seen; in a region the shape of the tokens does, as Triton writes it."""
    assert output_tokens(answer(*outputs)) == tokens


def test_tokens_of_an_answer_without_any_content() -> None:
    """A server that leaves empty contents away altogether."""
    message = answer(("output_ids", (1, 1, 6), b""), ("sequence_length", (1, 1), b""))
    del message.raw_output_contents[:]
    assert output_tokens(message) == 6


@pytest.mark.parametrize(("size", "tokens"), [(29, 25), (4, 0), (0, 0)])
def test_a_text_in_shared_memory_counts_by_its_size(size: int, tokens: int) -> None:
    """Without the four bytes of its length. The text cannot be seen; a token a byte is the bound elsewhere, too."""
    request = service_pb2.ModelInferRequest()
    held = request.inputs.add(name="text_input", datatype="BYTES", shape=(1, 1))
    held.parameters["shared_memory_region"].string_param = "prompt"
    held.parameters["shared_memory_byte_size"].int64_param = size
    assert Tensors(structure_of(request.SerializeToString())).input_tokens() == tokens


def test_token_ids_in_shared_memory_count_by_their_shape() -> None:
    """As everywhere: the shape is in the message."""
    request = service_pb2.ModelInferRequest()
    held = request.inputs.add(name="input_ids", datatype="INT32", shape=(1, 7))
    held.parameters["shared_memory_region"].string_param = "prompt"
    assert Tensors(structure_of(request.SerializeToString())).input_tokens() == 7
