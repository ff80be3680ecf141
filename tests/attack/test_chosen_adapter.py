"""A client that may not use `chef` tries to be answered by it: with `sql` named, or with nothing named.

An engine with dummy compute answers with tokens that tell the task id that it was given, so the answer itself says
which adapter it is from.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from tritonclient.grpc import service_pb2

from sidecar.proto import admin_pb2
from tests.kit import protobuf_wire as pw
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import parameters_of, restrict, status_of
from tests.kit.kserve_clients import tokens_of as tokens_of_response
from tests.kit.peft_files import write_adapter
from tests.kit.protobuf_wire import entry, field, int32, number_field, parameter, tag, tensor, uint64, varint
from tests.kit.serving import Serving, serving

CORE = field(pw.MODEL, "tensorrt_llm")
SQL = parameter("lora_name", "sql")
PROMPT = tensor("input_ids", "INT32", 1, 3) + tensor("input_lengths", "INT32", 1, 1)
LENGTH = tensor("request_output_len", "INT32", 1, 1)
INPUTS = PROMPT + LENGTH
TASK_ID = tensor("lora_task_id", "UINT64", 1, 1)
CONTENTS = field(pw.RAW, int32(1, 2, 3)) + field(pw.RAW, int32(3)) + field(pw.RAW, int32(2))
TYPED = (
    tensor("input_ids", "INT32", 1, 3, more=field(pw.CONTENTS, field(pw.INT_CONTENTS, b"\1\2\3")))
    + tensor("input_lengths", "INT32", 1, 1, more=field(pw.CONTENTS, field(pw.INT_CONTENTS, b"\3")))
    + tensor("request_output_len", "INT32", 1, 1, more=field(pw.CONTENTS, field(pw.INT_CONTENTS, b"\2")))
)
WHOLE = CORE + SQL + INPUTS + CONTENTS
NOT_READ = number_field(11, 1)
"""A field that nobody has: Python's protobuf then sets a whole map entry aside, and C++'s reads it."""


def with_id(chef: int) -> bytes:
    return field(pw.RAW, uint64(chef))


def typed_id(chef: int) -> bytes:
    return field(pw.CONTENTS, field(pw.UINT64_CONTENTS, varint(chef)))


ATTACKS: dict[str, Callable[[int], bytes]] = {
    "one raw content more": lambda chef: WHOLE + with_id(chef),
    "one raw content more, before the others' end": lambda chef: CORE + SQL + CONTENTS + with_id(chef) + INPUTS,
    "raw contents beside typed ones": lambda chef: CORE + SQL + TYPED + with_id(chef),
    "raw contents for inputs in shared memory": lambda chef: (
        WHOLE + with_id(chef) + tensor("end_id", "INT32", 1, 1, more=parameter("shared_memory_region", "mine"))
    ),
    "an input with a region of no string": lambda chef: (
        WHOLE + with_id(chef) + tensor("end_id", "INT32", 1, 1, more=parameter("shared_memory_region", 1))
    ),
    "a region in a map entry with a field that nobody has": lambda chef: (
        WHOLE
        + tensor(
            "end_id",
            "INT32",
            1,
            1,
            more=field(4, field(1, "shared_memory_region") + field(2, field(pw.STRING, "mine")) + NOT_READ),
        )
        + with_id(chef)
    ),
    "an input without content": lambda chef: WHOLE + tensor("end_id", "INT32", 1, 1),
    "its own task id beside the name": lambda chef: WHOLE + TASK_ID + with_id(chef),
    "its own task id alone": lambda chef: CORE + INPUTS + TASK_ID + CONTENTS + with_id(chef),
    "its own typed task id": lambda chef: CORE + TYPED + tensor("lora_task_id", "UINT64", 1, 1, more=typed_id(chef)),
    "a task id whose name goes on after a NUL": lambda chef: (
        CORE + INPUTS + tensor("lora_task_id\0x", "UINT64", 1, 1) + CONTENTS + with_id(chef)
    ),
    "a task id in capitals": lambda chef: (
        CORE + INPUTS + tensor("LORA_TASK_ID", "UINT64", 1, 1) + CONTENTS + with_id(chef)
    ),
    "a task id after a space": lambda chef: (
        CORE + INPUTS + tensor(" lora_task_id", "UINT64", 1, 1) + CONTENTS + with_id(chef)
    ),
    "an input twice": lambda chef: WHOLE + LENGTH + field(pw.RAW, int32(2)),
    "an unknown field": lambda chef: WHOLE + field(9, uint64(chef)),
    "an unknown field in an input": lambda chef: (
        CORE + SQL + PROMPT + tensor("request_output_len", "INT32", 1, 1, more=field(9, b"x")) + CONTENTS
    ),
    "a name in a map entry with a field that nobody has": lambda chef: (
        CORE + INPUTS + CONTENTS + field(pw.PARAMETERS, field(1, "lora_name") + field(2, field(3, "sql")) + NOT_READ)
    ),
    "the name twice": lambda chef: WHOLE + parameter("lora_name", "chef"),
    "the model twice": lambda chef: WHOLE + CORE,
    "a group": lambda chef: WHOLE + tag(9, pw.GROUP) + with_id(chef) + tag(9, pw.GROUP_END),
    "an overlong tag": lambda chef: WHOLE + varint(7 << 3 | 2, longer_by=1) + b"\x08" + uint64(chef),
    "an overlong length": lambda chef: WHOLE + b"\x3a" + varint(8, longer_by=2) + uint64(chef),
    "a field of another wire type": lambda chef: WHOLE + number_field(pw.RAW, chef),
    "a last field that is cut off, to swallow what follows": lambda chef: WHOLE + b"\x3a\x40",
    "a group without an end": lambda chef: WHOLE + tag(9, pw.GROUP),
    "a name that is no string": lambda chef: CORE + INPUTS + CONTENTS + parameter("lora_name", chef),
    "a name that is no text": lambda chef: (
        CORE + INPUTS + CONTENTS + entry(pw.PARAMETERS, "lora_name", field(pw.STRING, b"sql\xff"))
    ),
    "two ids of different models": lambda chef: (
        CORE + INPUTS + TASK_ID + tensor("lora_id", "UINT64", 1) + CONTENTS + field(pw.RAW, uint64(1)) + with_id(chef)
    ),
}


@asynccontextmanager
async def kitchen(folder: Path, decoupled: bool = True, **options: Any) -> AsyncIterator[tuple[Serving, Any]]:
    """Serve `sql` to everybody and `chef`, which the engine has already, to the tenant `cook`."""
    write_adapter(folder / "sql", seed=1)
    write_adapter(folder / "chef", seed=2)
    async with (
        running_engine(compute="none", decoupled=decoupled) as engine,
        serving([engine], roots=[folder], tenant_from="metadata", **options) as served,
    ):
        await served.adapters.Register(admin_pb2.RegisterRequest(name="sql", path=str(folder / "sql"), hold_s=3600))
        await restrict(served, folder / "chef", "cook")
        for adapter in ("chef", "sql"):
            await served.ask(adapter, tenant="cook")
        yield served, engine


def unary(channel: grpc.aio.Channel) -> Any:
    """Return ModelInfer for requests that are bytes."""
    answer = service_pb2.ModelInferResponse.FromString
    return channel.unary_unary("/inference.GRPCInferenceService/ModelInfer", response_deserializer=answer)


async def streamed(channel: grpc.aio.Channel, message: bytes) -> list[Any]:
    """Send bytes on a stream of its own; return the answers."""
    answer = service_pb2.ModelStreamInferResponse.FromString
    method: Any = channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer", response_deserializer=answer
    )
    return [response async for response in method(iter([message]))]


def ran(engine: Any) -> int:
    return sum(record.tokens > 0 for record in engine.served)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Serving, Any]]:
    async with kitchen(tmp_path_factory.mktemp("kitchen")) as both:
        yield both


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.asyncio(loop_scope="module")
async def test_bytes_that_choose_an_adapter_reach_no_engine(house: tuple[Serving, Any], attack: str) -> None:
    """Each is refused as the client's mistake, before an engine hears of it."""
    served, engine = house
    before = ran(engine)
    (answer,) = await streamed(served.channel, ATTACKS[attack](served.task_id("chef")))
    assert answer.error_message.startswith("[INVALID_REQUEST]")
    assert not answer.infer_response.outputs
    assert ran(engine) == before


@pytest.mark.asyncio(loop_scope="module")
async def test_the_same_request_without_a_trick_is_answered(house: tuple[Serving, Any]) -> None:
    """However it is ordered and whatever is left out: the answer is from the adapter that is told."""
    served, _ = house
    default_written_out = field(pw.ID, "") + field(pw.VERSION, "")
    for message in (
        WHOLE,
        CONTENTS + INPUTS + SQL + CORE,
        CORE + SQL + TYPED,
        WHOLE + default_written_out,
        CORE
        + SQL
        + CONTENTS
        + PROMPT
        + field(
            pw.INPUTS, field(1, "request_output_len") + field(2, "INT32") + number_field(3, 1) + number_field(3, 1)
        ),
    ):
        answers = [answer.infer_response for answer in await streamed(served.channel, message)]
        assert parameters_of(answers[-1])["lora_version"] == "sql@v1"
        tokens = [token for answer in answers for token in tokens_of_response(answer)]
        assert tokens[-1] == served.expected("sql", 2)[-1]


@pytest.mark.asyncio
async def test_bytes_that_choose_an_adapter_in_a_unary_call(tmp_path: Path) -> None:
    """The same check stands before both verbs."""
    async with kitchen(tmp_path, decoupled=False) as (served, engine):
        before = ran(engine)
        for attack in ("one raw content more", "a task id whose name goes on after a NUL"):
            error = await status_of(unary(served.channel)(ATTACKS[attack](served.task_id("chef"))))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert ran(engine) == before
        answer = await unary(served.channel)(WHOLE)
        assert parameters_of(answer)["lora_version"] == "sql@v1"
