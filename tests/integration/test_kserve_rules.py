"""No silent base model: what a Triton client may say of adapters, and what it is told when it says it wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from tests.kit.emulated import channel_to, clients_asked, core_request, random_adapter, running_engine, stream_answers
from tests.kit.kserve_clients import DUMMY, aio_client, ask, core_inputs, tensor, tokens_of
from tests.kit.serving import serving, write_adapters


def lora_tensors(task_id: int, weights: bool = False) -> list[triton.InferInput]:
    """Return what a client sends that handles LoRA itself."""
    made = [tensor("lora_task_id", [[task_id]], np.uint64)]
    if weights:
        packed, config = random_adapter(1)
        made += [tensor("lora_weights", [packed], np.float16), tensor("lora_config", [config], np.int32)]
    return made


def typed(request: Any) -> Any:
    """Return a request of `core_request` with typed contents."""
    for place in (0, 1, 2):
        values = np.frombuffer(request.raw_input_contents[place], np.int32).tolist()
        request.inputs[place].contents.int_contents.extend(values)
    for place in (3, 4):
        request.inputs[place].contents.bool_contents.append(request.raw_input_contents[place] == b"\1")
    del request.raw_input_contents[:]
    return request


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("lora", "lora_name"),
        ("adapter", "lora_name"),
        ("adapter_name", "lora_name"),
        ("adapter_id", "lora_name"),
        ("lora_adapter", "lora_name"),
        ("lora_task_id", "lora_name"),
        ("LORA_NAME", "lora_name"),
        ("lora-name", "lora_name"),
        ("loraName", "lora_name"),
        ("lora_tennant", "lora_tenant"),
        ("lora_deadline", "lora_deadline_ms"),
        ("lora_classes", "lora_class"),
    ],
)
async def test_a_parameter_that_was_meant_to_be_ours_is_refused(tmp_path: Path, wrong: str, meant: str) -> None:
    """With exactly the sentence that says which was meant; nothing reaches the engine."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        told = await ask(client, parameters={wrong: "a00"})
        assert told.errors == [f'[INVALID_REQUEST] unknown parameter "{wrong}"; did you mean "{meant}"?']
        assert told.responses == []
        assert not clients_asked(engine)


async def test_the_name_may_come_as_metadata(tmp_path: Path) -> None:
    """`lora-name` and its like are read from the call's metadata; the request's own word wins; a slip is refused."""
    write_adapters(tmp_path, 2)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        told = await ask(client, headers={"lora-name": "a00", "lora-tenant": "blue", "lora-class": "default"})
        assert told.tokens() == served.expected("a00", 4)
        told = await ask(client, name="a01", headers={"lora-name": "a00"})
        assert told.tokens() == served.expected("a01", 4)
        told = await ask(client, headers={"lora-nam": "a00"})
        assert told.errors == ['[INVALID_REQUEST] unknown metadata "lora-nam"; did you mean "lora-name"?']
        told = await ask(client, name="a00", parameters={"lora_class": "golden"})
        assert "unknown class" in told.errors[0]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"lora_name": ""}, "lora_name is empty"),
        ({"lora_name": 7}, 'the parameter "lora_name" must be a string, not int64'),
        ({"lora_name": True}, 'the parameter "lora_name" must be a string, not bool'),
        ({"lora_deadline_ms": "soon"}, 'lora_deadline_ms is "soon"; it must be milliseconds from now'),
        ({"lora_deadline_ms": -1}, 'lora_deadline_ms is "-1"'),
        ({"lora_deadline_ms": "nan"}, 'lora_deadline_ms is "nan"'),
        ({"lora_deadline_ms": False}, "must be a string, not bool"),
        ({"lora_name": "x" * 1_000_000}, 'the parameter "lora_name" has 1000000 characters'),
        ({"note": "x" * 1_000_000, "more": "y" * 1_000_000}, "has 1000004 characters; at most 65536"),
        ({"x" * 100_000: 1}, "has 100000 characters; at most 65536"),
        ({"lora_name": "a00@v9"}, "a00"),
        ({"lora_name": "ünïcode"}, "unknown adapter"),
        ({"lora_name": "ünï\ncode"}, 'the parameter "lora_name" has U+000A at 3'),
    ],
)
async def test_bad_parameters_each_have_their_own_message(
    tmp_path: Path, parameters: dict[str, Any], sentence: str
) -> None:
    """It names the thing and the way out, it is short, and the process serves on."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        told = await ask(client, parameters=parameters)
        assert sentence in told.errors[0]
        assert len(told.errors[0]) < 500
        assert not clients_asked(engine)
        assert (await ask(client, name="a00")).tokens() == served.expected("a00", 4)
        assert not served.sidecar.gateway.tickets


async def test_base_requests_can_be_refused(tmp_path: Path) -> None:
    """`base_requests: refuse` says which parameter is missing."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, base_requests="refuse") as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        told = await ask(client)
        assert 'name one with the request parameter "lora_name"' in told.errors[0]
        assert (await ask(client, name="a00")).tokens() == served.expected("a00", 4)


async def test_legacy_ids_mean_names(tmp_path: Path) -> None:
    """A client that warms up with weights and then sends ids works with no line changed; its weights stay here."""
    write_adapters(tmp_path, 2)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, legacy_task_ids={1: "a00", 2: "gone"}) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        for weights in (True, False):
            inputs = core_inputs()
            inputs[1:1] = lora_tensors(1, weights)  # in the middle: raw contents belong by place
            told = await ask(client, inputs=inputs, request_id="old")
            assert (told.errors, told.tokens()) == ([], served.expected("a00", 4))
            assert told.last["lora_version"] == "a00@v1"
        told = await ask(client, inputs=core_inputs() + lora_tensors(2))
        assert 'adapter "lora_task_id 2" is unknown or not permitted' in told.errors[0]
        told = await ask(client, inputs=core_inputs() + lora_tensors(3))
        assert "lora_task_id 3" in told.errors[0]
        assert "legacy_task_ids" in told.errors[0]


async def test_legacy_ids_in_typed_contents(tmp_path: Path) -> None:
    """A typed request is stripped of its typed id, and only of that."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, legacy_task_ids={1: "a00"}) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        request = typed(core_request(tokens=3, streaming=True))
        task = request.inputs.add(name="lora_task_id", datatype="UINT64", shape=[1, 1])
        task.contents.uint64_contents.append(1)
        answers = await stream_answers(stub, request)
        assert [t for answer in answers for t in tokens_of(answer.infer_response)] == served.expected("a00", 3)


async def test_a_name_and_lora_tensors_together_are_refused(tmp_path: Path) -> None:
    """Two answers to one question: the error names the tensor to drop, even where clients may send their own."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, allow_client_lora=True, legacy_task_ids={1: "a00"}) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        for weights in (True, False):
            told = await ask(client, name="a00", inputs=core_inputs() + lora_tensors(1, weights))
            assert "the request has lora_name and lora_task_id; drop the lora_* tensors" in told.errors[0]
        assert not clients_asked(engine)


async def test_a_clients_own_lora_is_refused_unless_allowed(tmp_path: Path) -> None:
    """The base model's answer would be a silent lie."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        for inputs in (lora_tensors(5), lora_tensors(5, weights=True), lora_tensors(5, weights=True)[1:]):
            told = await ask(client, inputs=core_inputs() + inputs)
            assert "request parameter lora_name instead" in told.errors[0]
        assert not clients_asked(engine)


async def test_a_clients_own_lora_below_our_ids_is_allowed_by_configuration(tmp_path: Path) -> None:
    """It passes untouched; an id in our range, hidden, doubled or missing, never does."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, allow_client_lora=True) as served,
        aio_client(served.sidecar.data_address) as client,
        channel_to(served.sidecar.data_address) as stub,
        aio_client(engine.grpc_address) as direct,
    ):
        told = await ask(client, inputs=core_inputs() + lora_tensors(5, weights=True))
        known = await ask(direct, inputs=core_inputs() + lora_tensors(5))
        assert (told.errors, told.tokens()) == ([], known.tokens())
        ours = served.task_id("a00")
        batch_of_two = [tensor("lora_task_id", [[5], [ours]], np.uint64)]
        for inputs in (lora_tensors(ours, weights=True), lora_tensors(ours), batch_of_two, lora_tensors(1 << 32)):
            told = await ask(client, inputs=core_inputs() + inputs)
            assert "larger ids are the sidecar's" in told.errors[0]
        two_ids = await ask(client, inputs=core_inputs() + lora_tensors(5) + lora_tensors(ours))
        assert "twice" in two_ids.errors[0]
        request = typed(core_request(streaming=True))
        smuggled = request.inputs.add(name="lora_task_id", datatype="UINT64", shape=[1, 1])
        smuggled.contents.int_contents.append(5)
        smuggled.contents.uint64_contents.append(ours)
        answers = await stream_answers(stub, request)
        assert "larger ids are the sidecar's" in answers[0].error_message
        assert len([record for record in clients_asked(engine) if record.tokens]) == 2
