"""What is read of a KServe request: its size in seats and tokens, its ids and flags, and what its refusal says."""

from __future__ import annotations

import re
import struct
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from sidecar.errors import Refused
from sidecar.fronts.kserve.parameters import seconds_until
from sidecar.fronts.kserve.request import KServeRequest, Rules, read
from sidecar.fronts.kserve.structure import REPEATED_MAX, id_in, structure_of
from tests.kit import protobuf_wire as pw


def request_with(*tensors: tuple[str, str, tuple[int, ...], bytes], **fields: str) -> Any:
    """Return a request with raw contents, each tensor as (name, datatype, shape, content)."""
    request = service_pb2.ModelInferRequest(**({"model_name": "core"} | fields))
    for name, datatype, shape, content in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(content)
    return request


def count(name: str, value: int) -> tuple[str, str, tuple[int, ...], bytes]:
    return name, "INT32", (1, 1), pw.int32(value)


def read_of(request: Any, rules: Rules | None = None) -> KServeRequest:
    return read(structure_of(request.SerializeToString()), True, {}, rules or Rules({}, False), "made")


@pytest.mark.parametrize(
    ("counts", "sequences", "tokens"),
    [
        ({}, 1, 0),
        ({"request_output_len": 4}, 1, 4),
        ({"request_output_len": -1}, 1, 0),
        ({"max_tokens": 4, "beam_width": 2}, 1, 8),
        ({"sampling_param_max_tokens": 4, "sampling_param_n": 3}, 3, 12),
        ({"request_output_len": 4, "num_return_sequences": 0}, 1, 4),
    ],
)
def test_the_seats_and_tokens_of_a_request(counts: dict[str, int], sequences: int, tokens: int) -> None:
    """A seat for each answer, one for all beams; without a length no token is counted."""
    facts = read_of(request_with(*(count(name, value) for name, value in counts.items()))).facts
    assert (facts.sequences, facts.output_tokens_max) == (sequences, tokens)


@pytest.mark.parametrize(("asked", "told"), [("", "1"), ("7", "7")])
def test_the_version_that_answers_to_a_stop_name(asked: str, told: str) -> None:
    """The one that was asked for; 1 if the request leaves it to the server."""
    assert read_of(request_with(model_version=asked)).version == told


def test_an_id_of_64_bits_is_read_unsigned() -> None:
    """As its datatype says: the highest bit is no sign."""
    ids = ("lora_task_id", "UINT64", (1, 1), pw.uint64(1 << 63))
    assert read_of(request_with(ids), Rules({1 << 63: "sql"}, False)).facts.adapter == "sql"


@pytest.mark.parametrize(("content", "stop"), [(b"\1", True), (b"\0", False), (b"", False)])
def test_a_stop_in_raw_contents(content: bytes, stop: bool) -> None:
    assert read_of(request_with(("stop", "BOOL", (1, 1), content))).stop is stop


@pytest.mark.parametrize("stop", [True, False])
def test_a_stop_in_typed_contents(stop: bool) -> None:
    request = request_with()
    request.inputs.add(name="stop", datatype="BOOL", shape=(1, 1)).contents.bool_contents.append(stop)
    assert read_of(request).stop is stop


@pytest.mark.parametrize(
    ("tensor", "tokens"),
    [
        (("input_ids", "INT32", (1, 3), pw.int32(7, 8, 9)), 3),
        (("input_ids", "INT32", (1, 7), pw.int32(7, 8, 9)), 3),
        (("text_input", "BYTES", (1, 1), pw.text("hello")), 5),
        (("text_input", "BYTES", (1, 1), struct.pack("<I", 1 << 31) + b"hello"), 9),
        (("text_input", "BYTES", (1, 1), b"\5\0\0"), 0),
    ],
    ids=["ids", "a shape that is too large", "text", "a length that is too large", "no length"],
)
def test_the_tokens_of_a_prompt(tensor: tuple[str, str, tuple[int, ...], bytes], tokens: int) -> None:
    """Never more than its content has room for."""
    assert read_of(request_with(tensor)).facts.input_tokens == tokens


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (pw.field(pw.MODEL, "core") + pw.field(pw.VERSION, "1") + pw.field(pw.ID, "mine"), "mine"),
        (pw.field(pw.MODEL, "core" * 50) + pw.field(pw.ID, "mine"), "mine"),
        (
            pw.tensor("x", "INT32", 1) + pw.field(pw.MODEL, "core") + pw.field(pw.VERSION, "1") + pw.field(pw.ID, "m"),
            "",
        ),
        (pw.field(pw.MODEL, "core"), ""),
        (pw.field(pw.ID, "mine")[:-1], ""),
        (pw.field(pw.ID, b"\xff"), ""),
    ],
    ids=["third", "second", "fourth", "none", "cut off", "no text"],
)
def test_the_id_of_a_request_that_is_refused(raw: bytes, told: str) -> None:
    """Its refusal on a stream is found by it; only the first three fields are read for it."""
    assert id_in(raw) == told


def test_a_field_too_many_is_named() -> None:
    """One that comes once, and one that may come often."""
    with pytest.raises(Refused, match="the request has model_name twice; send it once"):
        structure_of(pw.field(pw.MODEL, "core") * 2)
    with pytest.raises(Refused, match=f"the request has more than {REPEATED_MAX} inputs; no engine takes so many"):
        structure_of(pw.tensor("x", "INT32", 1) * (REPEATED_MAX + 1))


@pytest.mark.parametrize(
    ("text", "seconds"), [(None, None), ("1", 0.001), ("2.5e3", 2.5), ("999999999999", 1e9 - 1e-3)]
)
def test_a_deadline_is_milliseconds_from_now(text: str | None, seconds: float | None) -> None:
    assert seconds_until(text) == seconds


@pytest.mark.parametrize("text", ["0", "-1", "1e12", "inf", "nan", "soon"])
def test_a_deadline_that_is_none_is_refused(text: str) -> None:
    """It says between which bounds one has to be."""
    told = f'lora_deadline_ms is "{text}"; it must be milliseconds from now, above 0 and below 1e12'
    with pytest.raises(Refused, match=re.escape(told)):
        seconds_until(text)
