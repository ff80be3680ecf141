"""The LLM-API model behind a real Triton and behind the emulator's own face: the same bytes, and adapters from disk."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from tests.e2e.triton.lanes import EMULATOR, TRITON, Lane, lane_of, server_of
from tests.integration.test_emulator_llmapi import asking, dummy_text, texts
from tests.kit.emulated import add_tensor, channel_to, set_parameter, stream_answers
from tests.kit.peft_files import write_adapter
from tests.kit.serving import until

ENGINE = {
    "protocol": "llmapi",
    "lora_modules": ("attn_q", "attn_v"),
    "max_lora_rank": 8,
    "lora_max_rank_cached": 8,
    "lora_host_pages": 2,
    "lora_device_pages": 2,
}
"""Two adapters fit."""
DUMMY = ENGINE | {"compute": "none"}
GONE = "Error generating request: lora_path does not exist on the Triton server's filesystem: {}"

Start = Callable[..., dict[str, Lane]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, loop_of_servers: asyncio.Runner) -> Iterator[Start]:
    """Starts one server of each kind with an engine of these options."""
    servers = []

    def started(**engine: Any) -> dict[str, Lane]:
        lanes = {}
        for kind in (TRITON, EMULATOR):
            folder = tmp_path_factory.mktemp("lane") / "server"
            servers.append(server_of(kind, folder, engine))
            loop_of_servers.run(servers[-1].start())
            lanes[kind] = lane_of(kind, folder, servers[-1])
        return lanes

    yield started
    for server in servers:
        loop_of_servers.run(server.kill())


@pytest.fixture(scope="module", params=[True, False], ids=["decoupled", "whole"])
def both(request: pytest.FixtureRequest, start: Start) -> tuple[dict[str, Lane], bool]:
    """A server of each kind, and whether their models are decoupled."""
    return start(**DUMMY, decoupled=request.param), request.param


@pytest.fixture(scope="module")
def fresh(start: Start) -> dict[str, Lane]:
    """A server of each kind whose caches nobody has used."""
    return start(**DUMMY)


@pytest.fixture(scope="module")
def computing(start: Start) -> dict[str, Lane]:
    """A server of each kind whose engine computes."""
    return start(**ENGINE, compute="llama")


@pytest.fixture(scope="module")
def slow(start: Start) -> dict[str, Lane]:
    """A server of each kind that takes as long as a GPU."""
    return start(**DUMMY, time_scale=1.0)


@pytest.fixture
async def stubs(both: tuple[dict[str, Lane], bool]) -> AsyncIterator[list[Any]]:
    """A stub of the real server and one of the emulator."""
    lanes, _ = both
    async with channel_to(lanes[TRITON].grpc_address) as real, channel_to(lanes[EMULATOR].grpc_address) as face:
        yield [real, face]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder."""
    path = tmp_path_factory.mktemp("peft") / "sql"
    write_adapter(path, seed=1, modules=("q_proj", "v_proj"))
    return path


def _changed(change: Callable[[Any], Any]) -> Callable[[Path], Any]:
    def made(folder: Path) -> Any:
        request = asking()
        change(request)
        return request

    return made


def _without_text(request: Any) -> None:
    del request.inputs[0], request.raw_input_contents[0]


def _shaped(index: int, shape: list[int], data: Callable[[bytes], bytes] = lambda raw: raw) -> Callable[[Path], Any]:
    def change(request: Any) -> None:
        request.inputs[index].shape[:] = shape
        request.raw_input_contents[index] = data(request.raw_input_contents[index])

    return _changed(change)


CASES: dict[str, Callable[[Path], Any]] = {
    "base": lambda folder: asking(),
    "no length": lambda folder: asking(tokens=None),
    "no tokens": lambda folder: asking(tokens=0),
    "streamed": lambda folder: asking(streaming=True),
    "an adapter": lambda folder: asking(lora=(5, "sql", folder)),
    "an unknown source": lambda folder: asking(lora=(5, "sql", folder), source="zip"),
    "an id alone": lambda folder: asking(lora=(5, None, None)),
    "no id": lambda folder: asking(lora=(None, "sql", folder)),
    "a path that is not there": lambda folder: asking(lora=(5, "sql", folder / "gone")),
    "a folder without an adapter": lambda folder: asking(lora=(6, "sql", folder.parent)),
    "flags": lambda folder: asking(flags=("return_finish_reason", "return_stop_reason")),
    "listed outputs": lambda folder: asking(outputs=("text_output",)),
    "no text": _changed(_without_text),
    "two ids": _changed(lambda request: add_tensor(request, "lora_id", "UINT64", np.array([1, 2], np.uint64))),
    "a batched id": _changed(lambda request: add_tensor(request, "lora_id", "UINT64", np.array([[1]], np.uint64))),
    "another type": _changed(lambda request: add_tensor(request, "lora_id", "INT32", np.array([1], np.int32))),
    "an unexpected input": _changed(lambda request: add_tensor(request, "foo", "INT32", np.array([1], np.int32))),
    "an unexpected output": _changed(lambda request: request.outputs.add(name="bar")),
    "no shape": _shaped(1, []),
    "an open shape": _shaped(1, [-1]),
    "a flag of none": _shaped(1, [0], lambda raw: b""),
    "two strings for one": _shaped(0, [1], lambda raw: raw * 2),
    "two texts": _shaped(0, [2], lambda raw: raw * 2),
    "no texts": _shaped(0, [0], lambda raw: b""),
    "a text of two dimensions": _shaped(0, [1, 1]),
    "a cut text": _shaped(0, [1], lambda raw: raw[:-1]),
    "no UTF-8": _shaped(0, [1], lambda raw: b"\x02\0\0\0\xff\xfe"),
    "a stop": _changed(lambda request: add_tensor(request, "stop", "BOOL", np.array([True]))),
    "an empty final": _changed(lambda request: set_parameter(request, "triton_enable_empty_final_response", True)),
}


@pytest.mark.parametrize("case", CASES)
async def test_the_bytes_are_equal(
    both: tuple[dict[str, Lane], bool], stubs: list[Any], case: str, folder: Path
) -> None:
    """Whatever is asked, both servers say the same."""
    _, decoupled = both
    request = CASES[case](folder)
    real, face = [await _said(stub, request, decoupled) for stub in stubs]
    assert real == face
    assert real


async def _said(stub: Any, request: Any, decoupled: bool) -> list[Any]:
    if decoupled:
        return list(await stream_answers(stub, request))
    try:
        return [await stub.ModelInfer(request)]
    except grpc.aio.AioRpcError as error:
        return [error.code(), error.details()]


async def test_the_texts_of_adapters_that_cannot_be_loaded(
    both: tuple[dict[str, Lane], bool], stubs: list[Any], folder: Path
) -> None:
    """The three that a client can be told, word for word."""
    _, decoupled = both
    expected = {
        "an id alone": "Error generating request: lora_id, lora_name, and lora_path must all be provided together",
        "a path that is not there": GONE.format(folder / "gone"),
        "an unknown source": "Error generating request: lora_ckpt_source must be one of ('hf', 'nemo'), got 'zip'",
    }
    for stub in stubs:
        for case, text in expected.items():
            said = await _said(stub, CASES[case](folder), decoupled)
            assert (said[0].error_message if decoupled else said[1]) == text


@pytest.mark.parametrize("kind", [TRITON, EMULATOR])
async def test_adapters_come_back_by_themselves(fresh: dict[str, Lane], kind: str, tmp_path: Path) -> None:
    """Four adapters over room for two, in turn: each is read again when it was evicted, and nobody is told."""
    lane = fresh[kind]
    for number in range(1, 5):
        write_adapter(tmp_path / str(number), seed=number, modules=("q_proj", "v_proj"))
    async with channel_to(lane.grpc_address) as stub:
        for number in [1, 2, 3, 4, 4, 1, 2, 3]:
            (answer,) = await stream_answers(stub, asking(lora=(number, str(number), tmp_path / str(number))))
            assert not answer.error_message
            assert texts(answer.infer_response) == [dummy_text(number, 4)]
        shutil.rmtree(tmp_path / "3")
        (gone,) = await stream_answers(stub, asking(lora=(3, "3", tmp_path / "3")))
    assert gone.error_message == GONE.format(tmp_path / "3")
    assert [(one["task_id"], one["weights"]) for one in lane.served()] == [
        (1, True), (2, True), (3, True), (4, True), (4, False), (1, True), (2, True), (3, True),
    ]  # fmt: skip


async def test_both_compute_the_same(computing: dict[str, Lane], tmp_path: Path) -> None:
    """Base and three adapters: the same texts, and each another."""
    for number in range(1, 4):
        write_adapter(tmp_path / str(number), seed=number, modules=("q_proj", "v_proj"), size=0.5)
    loras = [None, *((number, str(number), tmp_path / str(number)) for number in range(1, 4))]
    answers = []
    for lane in computing.values():
        async with channel_to(lane.grpc_address) as stub:
            told = [await stream_answers(stub, asking("select", 12, lora, streaming=True)) for lora in loras]
        answers.append([texts(messages[-1].infer_response) for messages in told])
    assert answers[0] == answers[1]
    assert len({text for (text,) in answers[0]}) == len(loras)


@pytest.mark.parametrize("kind", [TRITON, EMULATOR])
async def test_a_client_that_leaves_ends_its_request(slow: dict[str, Lane], kind: str) -> None:
    """As at the other kind of model."""
    lane = slow[kind]
    async with channel_to(lane.grpc_address) as stub:
        call = stub.ModelStreamInfer(iter([asking(tokens=5000, streaming=True, request_id="left")]))
        await call.read()
        call.cancel()
        await until(lambda: bool(lane.served()))
    assert [one["outcome"] for one in lane.served()] == ["cancelled"]


async def test_metadata_of_a_model_without_a_batch_dimension(stubs: list[Any]) -> None:
    """Shapes and configuration are what the client sends."""
    real, face = [await stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="tensorrt_llm")) for stub in stubs]
    assert [(one.name, one.datatype, list(one.shape)) for one in real.inputs] == [
        (one.name, one.datatype, list(one.shape)) for one in face.inputs
    ]
