"""A message that is cheap to send and dear to read: millions of tiny fields, or bytes that are no message at all."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from time import thread_time
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from sidecar.errors import Refused
from sidecar.fronts.kserve import request
from sidecar.fronts.kserve.structure import structure_of
from tests.kit import protobuf_wire as pw
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import DUMMY, status_of
from tests.kit.protobuf_wire import entry, field, number_field, parameter, tensor
from tests.kit.serving import Serving, serving, write_adapters

MILLION = 1_000_000
CORE = field(pw.MODEL, "tensorrt_llm")
INFER = "/inference.GRPCInferenceService/ModelInfer"
GENERATE = "/lorasidecar.v1.Gateway/Generate"
MANY_FIELDS = {
    "3 million inputs": CORE + field(pw.INPUTS, b"") * (3 * MILLION),
    "a million parameters": CORE + parameter("x", 1) * MILLION,
    "20 million raw contents": CORE + field(pw.RAW, b"") * (20 * MILLION),
    "a million outputs": CORE + field(pw.OUTPUTS, b"") * MILLION,
    "a million parameters in an input": CORE + tensor("x", "INT32", 1, more=entry(4, "k", b"") * MILLION),
    "a million dimensions": CORE + tensor("x", "INT32", more=number_field(pw.SHAPE, 1) * MILLION),
    "a million typed strings": CORE
    + tensor("x", "BYTES", MILLION, more=field(pw.CONTENTS, field(pw.BYTES_CONTENTS, b"") * MILLION)),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(folder, 1)
    async with running_engine(**DUMMY) as engine, serving([engine], folder) as house:
        yield house


async def generated(channel: grpc.aio.Channel, raw: bytes) -> grpc.aio.AioRpcError:
    """Return the error that bytes sent to `Generate` end with."""
    method: Any = channel.unary_stream(GENERATE)
    return await status_of(anext(aiter(method(raw))))


@pytest.mark.parametrize("what", MANY_FIELDS)
@pytest.mark.asyncio(loop_scope="module")
async def test_millions_of_fields_are_refused_unparsed(served: Serving, what: str) -> None:
    """With words that say what there are too many of."""
    error = await status_of(served.channel.unary_unary(INFER)(MANY_FIELDS[what]))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no engine takes so many" in (error.details() or "")


@pytest.mark.asyncio(loop_scope="module")
async def test_text_where_a_number_is_asked_for_is_the_engines_to_refuse(
    served: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """A length that is typed text ended its call with an exception of ours."""
    words = field(pw.CONTENTS, field(pw.BYTES_CONTENTS, "hello"))
    method: Any = served.channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    (answer,) = [one async for one in method(iter([CORE + tensor("request_output_len", "BYTES", 1, 1, more=words)]))]
    assert b"BACKEND_REJECTED" in answer
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("what", ["inputs", "dimensions"])
def test_what_a_refusal_costs_does_not_grow_with_the_message(what: str) -> None:
    """Sixteen times the fields cost no more than four times the time, where all have to be looked at sixteen times."""

    def cost_s(count: int) -> float:
        inputs = field(pw.INPUTS, b"") * count
        dimensions = tensor("x", "INT32", more=number_field(pw.SHAPE, 1) * count)
        raw = CORE + (inputs if what == "inputs" else dimensions)
        began = thread_time()
        for _ in range(5):
            with pytest.raises(Refused):
                request.read(structure_of(raw), True, {}, request.Rules({}, False))
        return thread_time() - began

    assert cost_s(16 * 60_000) <= 4 * cost_s(60_000) + 0.05


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (field(2, "x" * (9 << 20)), "bytes; at most"),
        (field(3, field(1, b"\1" * (2 << 20))), "token ids; at most"),
        (field(2, "x") + field(11, "") * 1000, "stop_words; at most"),
        (field(2, "x") + field(11, "") * MILLION, "no engine takes so many"),
        (field(2, "x") + field(99, "sql"), "field 99"),
        (field(2, "x") + number_field(2, 1), "field 2 of wire type 0"),
        (field(1, b"\xff") + field(2, "x"), "malformed protobuf"),
        (b"\xff\xff\xff", "malformed protobuf"),
        (field(2, "x")[:-1], "malformed protobuf"),
    ],
    ids=["text", "ids", "stop words", "fields", "unknown field", "wire type", "no text", "no message", "cut off"],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_generate_refuses_what_no_engine_takes(
    served: Serving, caplog: pytest.LogCaptureFixture, raw: bytes, words: str
) -> None:
    """As the client's mistake, and without a line in the log."""
    error = await generated(served.channel, raw)
    assert (error.code(), words in (error.details() or "")) == (grpc.StatusCode.INVALID_ARGUMENT, True), error.details()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    "method",
    [
        "/lorasidecar.v1.Adapters/Register",
        "/lorasidecar.v1.Queues/Get",
        "/inference.GRPCInferenceService/RepositoryIndex",
        "/grpc.health.v1.Health/Check",
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_malformed_admin_messages_are_refused_without_a_traceback(
    served: Serving, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    error = await status_of(served.admin_channel.unary_unary(method)(b"\xff\xff\xff"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "malformed protobuf" in (error.details() or "")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    "method", ["/lorasidecar.v1.Adapters/Push", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_malformed_stream_is_refused_without_a_traceback(
    served: Serving, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """Of a method that returns a message, and of one that generates several."""
    call: Any = served.admin_channel.stream_unary(method)
    error = await status_of(call(iter([b"\xff\xff\xff"])))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.asyncio
async def test_a_message_has_a_bound_of_its_own_on_each_listener(tmp_path: Path) -> None:
    """Past it gRPC itself says so; what fits is answered."""
    free = {"address": "127.0.0.1:0"}
    listeners = {"data": free | {"message_bytes_max": 65_536}, "admin": free, "http": free}
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path, listeners=listeners) as house:
        error = await generated(house.channel, field(2, "x" * 65_536))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await house.ask("a00", 2)).tokens == house.expected("a00", 2)
        pushed = await status_of(house.admin_channel.unary_unary("/lorasidecar.v1.Adapters/Get")(bytes(5 << 20)))
        assert pushed.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("verb", [INFER, GENERATE])
@pytest.mark.asyncio(loop_scope="module")
async def test_a_message_that_inflates_is_not_taken(served: Serving, verb: str) -> None:
    """A thousandth of its size on the wire: no listener decompresses, and says so; plain calls go on."""
    error = await status_of(served.channel.unary_unary(verb)(bytes(32 << 20), compression=grpc.Compression.Gzip))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    error = await status_of(served.channel.unary_unary(INFER)(b"\x00"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
