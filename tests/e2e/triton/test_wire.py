"""What goes over the wire, byte for byte: one suite for the real Triton and for the emulator's own face."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from sidecar.backends.faults import classify
from sidecar.core.enums import Fault
from tests.e2e.triton.forms import (
    adapter_tokens,
    add_config,
    asking_for,
    base_tokens,
    data,
    empty_final,
    executor,
    failed,
    miss,
    rejected,
    stopping,
    text_data,
    unary_error,
    unnumbered,
    without,
)
from tests.e2e.triton.lanes import EMULATOR, TRITON, Lane, lane_of, server_of
from tests.kit.emulated import (
    add_lora,
    add_tensor,
    channel_to,
    core_request,
    is_final,
    random_adapter,
    set_parameter,
    stream_answers,
    text_request,
    tokens_of,
)
from tests.kit.rejections import NOT_FOUND, REJECTIONS, unknown_region
from tests.kit.serving import until

ENGINE = {
    "compute": "none",
    "lora_modules": ("attn_q", "attn_v"),
    "max_lora_rank": 8,
    "lora_max_rank_cached": 8,
    "lora_host_pages": 2,
    "lora_device_pages": 2,
    "max_queue": 32,
    "time_scale": 0.1,
}
"""Two adapters fit; a step takes about a millisecond, so that a long answer is running while others come."""
FETCH = "Encountered an error when fetching new request: "
LONG = 8000


@pytest.fixture(scope="module", params=[TRITON, EMULATOR])
def start(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, loop_of_servers: asyncio.Runner
) -> Iterator[Callable[..., Lane]]:
    """Starts servers of one kind, whose engines differ from ENGINE by the options given."""
    servers = []

    def started(**options: Any) -> Lane:
        folder = tmp_path_factory.mktemp("lane") / "server"
        servers.append(server_of(request.param, folder, {**ENGINE, **options}))
        loop_of_servers.run(servers[-1].start())
        return lane_of(request.param, folder, servers[-1])

    yield started
    for server in servers:
        loop_of_servers.run(server.kill())


@pytest.fixture(scope="module")
def decoupled(start: Callable[..., Lane]) -> Lane:
    """A server whose models are decoupled."""
    return start()


@pytest.fixture(scope="module")
def whole(start: Callable[..., Lane]) -> Lane:
    """A server whose models give one response to each request."""
    return start(decoupled=False)


@pytest.fixture(scope="module")
def separate(start: Callable[..., Lane]) -> Lane:
    """A server whose decoupled models end with an empty response of its own."""
    return start(separate_final=True)


@pytest.mark.parametrize(("request_of", "text"), REJECTIONS)
async def test_a_core_rejection_on_a_stream(decoupled: Lane, request_of: Callable[[], Any], text: str) -> None:
    """A rejection is a message and the id: no model name, no final flag; and our classes know it."""
    async with channel_to(decoupled.grpc_address) as stub:
        assert await stream_answers(stub, request_of()) == [rejected(text)]
    assert classify(text) is (Fault.UNKNOWN_REGION if request_of is unknown_region else Fault.REJECTED)


@pytest.mark.parametrize(("request_of", "text"), REJECTIONS)
async def test_a_core_rejection_on_a_unary_call(whole: Lane, request_of: Callable[[], Any], text: str) -> None:
    """The same text as a status."""
    code = grpc.StatusCode.NOT_FOUND if request_of in NOT_FOUND else grpc.StatusCode.INVALID_ARGUMENT
    async with channel_to(whole.grpc_address) as stub:
        assert await unary_error(stub, request_of()) == (code, text)


@pytest.mark.parametrize(("request_of", "text"), REJECTIONS)
async def test_a_rejection_on_the_stream_of_a_whole_model(
    whole: Lane, request_of: Callable[[], Any], text: str
) -> None:
    """The form does not depend on the model's policy."""
    async with channel_to(whole.grpc_address) as stub:
        assert await stream_answers(stub, request_of()) == [rejected(text)]


async def test_a_rejection_without_an_id(decoupled: Lane) -> None:
    """Texts that name the id say that it is unknown; the others stay as they are."""
    async with channel_to(decoupled.grpc_address) as stub:
        for request_of, text in REJECTIONS:
            request = request_of()
            request.id = ""
            expected = rejected(text.replace("[request id: r1]", "[request id: <id_unknown>]"), "")
            assert await stream_answers(stub, request) == [expected]


async def test_a_streamed_answer(decoupled: Lane) -> None:
    """One response a token; the flag is on every one and set on the last. Asking for an empty final changes nothing."""
    tokens = base_tokens(3)
    expected = [data([token], final=number == 2) for number, token in enumerate(tokens)]
    async with channel_to(decoupled.grpc_address) as stub:
        plain = await stream_answers(stub, core_request(tokens=3, streaming=True))
        asking = core_request(tokens=3, streaming=True, triton_enable_empty_final_response=True)
        assert plain == expected
        assert await stream_answers(stub, asking) == expected


async def test_an_answer_at_once(decoupled: Lane, whole: Lane) -> None:
    """Without streaming there is one response, with the flag on a stream and without it on a unary call."""
    async with channel_to(decoupled.grpc_address) as stub:
        assert await stream_answers(stub, core_request(tokens=3)) == [data(base_tokens(3), final=True)]
    async with channel_to(whole.grpc_address) as stub:
        assert await stub.ModelInfer(core_request(tokens=3)) == data(base_tokens(3), final=None)
        assert await stream_answers(stub, core_request(tokens=3)) == [data(base_tokens(3), final=True)]


async def test_an_end_of_its_own(separate: Lane) -> None:
    """The last data response is not final; the empty one that is comes only to those who ask for it."""
    expected = [data([token], final=False) for token in base_tokens(2)]
    async with channel_to(separate.grpc_address) as stub:
        assert await stream_answers(stub, core_request(tokens=2, streaming=True)) == expected
        asking = core_request(tokens=2, streaming=True, triton_enable_empty_final_response=True)
        assert await stream_answers(stub, asking) == [*expected, empty_final()]
        missed = await stream_answers(stub, add_lora(core_request(triton_enable_empty_final_response=True), 3))
        assert [unnumbered(message) for message in missed] == [failed(executor(miss(3)))]


async def test_a_decoupled_model_refuses_unary_calls(decoupled: Lane) -> None:
    """UNIMPLEMENTED, whatever else is wrong with the request."""
    text = "ModelInfer RPC doesn't support models with decoupled transaction policy"
    async with channel_to(decoupled.grpc_address) as stub:
        assert await unary_error(stub, core_request()) == (grpc.StatusCode.UNIMPLEMENTED, text)


async def test_a_miss(decoupled: Lane, whole: Lane) -> None:
    """An id that is not cached; with weights it works, and then alone."""
    adapter = random_adapter(1)
    async with channel_to(decoupled.grpc_address) as stub:
        missed = await stream_answers(stub, add_lora(core_request(streaming=True), 101))
        loaded = await stream_answers(stub, add_lora(core_request(tokens=2, streaming=True), 101, adapter))
        again = await stream_answers(stub, add_lora(core_request(tokens=2, streaming=True), 101))
    assert [unnumbered(message) for message in missed] == [failed(executor(miss(101)))]
    assert classify(missed[0].error_message) is Fault.MISS
    assert loaded == again == [data([token], number == 1) for number, token in enumerate(adapter_tokens(101, 2))]
    async with channel_to(whole.grpc_address) as stub:
        assert await unary_error(stub, add_lora(core_request(), 102)) == (
            grpc.StatusCode.INTERNAL,
            executor(miss(102)),
        )


async def test_a_full_cache(decoupled: Lane) -> None:
    """Two running adapters leave no page for a third, which works when one of them has ended."""
    full = f"{FETCH}Error storing task=203 in PEFT cache -- Cache is full. There are no done tasks to evict"
    async with channel_to(decoupled.grpc_address) as stub:
        running = [
            stub.ModelStreamInfer(
                iter([add_lora(core_request(tokens=LONG, streaming=True), task, random_adapter(task))])
            )
            for task in (201, 202)
        ]
        for call in running:
            assert not (await call.read()).error_message
        refused = await stream_answers(stub, add_lora(core_request(), 203, random_adapter(203)))
        running[0].cancel()
        await until(lambda: any(one["task_id"] == 201 for one in decoupled.served()))
        taken = await stream_answers(stub, add_lora(core_request(tokens=2), 203, random_adapter(203)))
        running[1].cancel()
    assert [unnumbered(message) for message in refused] == [failed(executor(full))]
    assert classify(refused[0].error_message) is Fault.FULL
    assert taken == [data(adapter_tokens(203, 2), final=True)]


BACKEND_ERRORS: list[tuple[str, Callable[[], Any], str]] = [
    (
        "a rank above the limit",
        lambda: add_lora(core_request(), 4, random_adapter(1, rank=9)),
        executor(f"{FETCH}Invalid low_rank (9). low_rank must be smaller than mMaxLowRank (8)"),
    ),
    (
        "a module that is not enabled",
        lambda: add_lora(core_request(), 4, random_adapter(1, modules=("attn_k",))),
        executor(f"{FETCH}lora module attn_k not enabled for this model"),
    ),
    (
        "rows that are too short",
        lambda: add_lora(core_request(), 4, (random_adapter(1)[0][:, :8], random_adapter(1)[1])),
        executor(f"{FETCH}lora_weights has to few values for attn_q"),
    ),
    (
        "config without weights",
        lambda: add_config(add_lora(core_request(), 4)),
        executor(f"{FETCH}Request for LoRA inference must have both lora_weights and lora_keys"),
    ),
    (
        "rows that do not match",
        lambda: add_lora(core_request(), 4, (random_adapter(1)[0], random_adapter(1)[1][:-1])),
        "Expected dim 0 of lora weights and lora config to have the same size",
    ),
    (
        "a length hidden by optional inputs",
        lambda: without(core_request(), 2),
        "request_output_len is not present in the request",
    ),
    (
        "outputs without the length",
        lambda: asking_for(core_request(), "output_ids"),
        "Error encountered while populating response: [TensorRT-LLM][ERROR] sequence_length tensor must be present in "
        "list of output tensors",
    ),
    ("a stop without an id", lambda: stopping(""), "Trying to stop a request but request ID is not provided"),
]


@pytest.mark.parametrize(
    ("request_of", "text"), [case[1:] for case in BACKEND_ERRORS], ids=[c[0] for c in BACKEND_ERRORS]
)
async def test_a_backend_error(decoupled: Lane, whole: Lane, request_of: Callable[[], Any], text: str) -> None:
    """An error message with the id, the model and the final flag; INTERNAL on a unary call."""
    request = request_of()
    async with channel_to(decoupled.grpc_address) as stub:
        answers = await stream_answers(stub, request)
    assert [unnumbered(message) for message in answers] == [failed(text, request_id=request.id)]
    assert classify(answers[0].error_message) is Fault.REJECTED
    async with channel_to(whole.grpc_address) as stub:
        assert await unary_error(stub, request) == (grpc.StatusCode.INTERNAL, text)


async def test_streaming_needs_a_decoupled_model(whole: Lane) -> None:
    """So does a batch."""
    batch = core_request()
    del batch.inputs[:], batch.raw_input_contents[:]
    for name in ("input_ids", "input_lengths", "request_output_len"):
        add_tensor(batch, name, "INT32", np.ones((2, 1), np.int32))
    async with channel_to(whole.grpc_address) as stub:
        assert await unary_error(stub, core_request(streaming=True)) == (
            grpc.StatusCode.INTERNAL,
            "Streaming is only supported if model is deployed using decoupled mode.",
        )
        assert await unary_error(stub, batch) == (
            grpc.StatusCode.INTERNAL,
            "Batch size > 1 requires the tensorrt_llm backend to be using decoupled transaction policy",
        )


async def test_the_stream_goes_on_after_errors(decoupled: Lane) -> None:
    """A rejection and a backend error, each followed by a request that is answered."""
    broken = core_request(request_id="broken", tokens=1)
    broken.outputs.add(name="bar")
    requests = [
        broken,
        core_request(request_id="first", tokens=1, streaming=True),
        add_lora(core_request(request_id="missed"), 9),
        core_request(request_id="second", tokens=1, streaming=True),
    ]
    async with channel_to(decoupled.grpc_address) as stub:
        answers = await stream_answers(stub, *requests)
    by_id = {message.infer_response.id: unnumbered(message) for message in answers}
    assert len(answers) == len(by_id)
    assert by_id == {
        "broken": rejected("unexpected inference output 'bar' for model 'tensorrt_llm'", "broken"),
        "first": data(base_tokens(1), True, "first"),
        "missed": failed(executor(miss(9)), request_id="missed"),
        "second": data(base_tokens(1), True, "second"),
    }


async def test_requests_with_one_id_run_side_by_side(decoupled: Lane) -> None:
    """Their responses cannot be told apart; each has its own end."""
    async with channel_to(decoupled.grpc_address) as stub:
        answers = await stream_answers(stub, *(core_request(tokens=3, streaming=True) for _ in range(3)))
    assert sorted(tokens_of(answers)) == sorted(base_tokens(3) * 3)
    assert sum(is_final(message) for message in answers) == 3


async def test_a_stop_ends_an_earlier_request(decoupled: Lane) -> None:
    """Both end without an error, the stop with a response that has no outputs."""
    stopped = pb.ModelInferResponse(model_name="tensorrt_llm", model_version="1", id="long")
    stopped.parameters["triton_final_response"].bool_param = True
    async with channel_to(decoupled.grpc_address) as stub:
        call = stub.ModelStreamInfer(iter([core_request(tokens=LONG, streaming=True, request_id="long")]))
        answers = [await call.read()]
        assert await stream_answers(stub, stopping("long")) == [pb.ModelStreamInferResponse(infer_response=stopped)]
        while (answer := await call.read()) is not grpc.aio.EOF:
            answers.append(answer)
        stopped.id = "never seen"
        assert await stream_answers(stub, stopping(stopped.id)) == [pb.ModelStreamInferResponse(infer_response=stopped)]
    assert [is_final(answer) for answer in answers] == [False] * (len(answers) - 1) + [True]
    assert not any(message.error_message for message in answers)
    assert len(answers) < LONG


async def test_a_client_that_leaves_ends_its_requests(decoupled: Lane) -> None:
    """The executor stops, and says so in its log."""
    async with channel_to(decoupled.grpc_address) as stub:
        call = stub.ModelStreamInfer(iter([core_request(tokens=LONG, streaming=True, request_id="left")]))
        await call.read()
        call.cancel()
        await until(lambda: any(one["request_id"] == "left" for one in decoupled.served()))
    (ending,) = [one for one in decoupled.served() if one["request_id"] == "left"]
    assert ending["outcome"] == "cancelled"
    assert 0 < ending["tokens"] < LONG


async def test_the_ensemble(decoupled: Lane, whole: Lane) -> None:
    """Text in the same forms; what fails in the core names the ensemble."""
    text = "".join(map(chr, base_tokens(2)))
    missed = f"in ensemble 'ensemble', {executor(miss(77))}"
    async with channel_to(decoupled.grpc_address) as stub:
        streamed = await stream_answers(stub, text_request(tokens=2, streaming=True))
        assert streamed == [text_data(text[0], False), text_data(text[1], True)]
        assert await stream_answers(stub, text_request(tokens=2)) == [text_data(text, True)]
        (answer,) = await stream_answers(stub, add_lora(text_request(), 77))
        assert unnumbered(answer) == failed(missed, "ensemble")
        assert classify(answer.error_message) is Fault.MISS
    async with channel_to(whole.grpc_address) as stub:
        assert await stub.ModelInfer(text_request(tokens=2)) == text_data(text, None)
        assert await unary_error(stub, add_lora(text_request(), 77)) == (grpc.StatusCode.INTERNAL, missed)


async def test_regions_of_shared_memory(decoupled: Lane) -> None:
    """What can't be registered or read."""
    memories = [SharedMemory(create=True, size=2 * PAGE) for _ in range(2)]
    key, other = (f"/{memory.name}" for memory in memories)
    memories[0].buf[:4] = (3).to_bytes(4, "little")
    invalid, internal = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL
    refused = [
        (("x", "/nobody", 0, 8), internal, "Unable to open shared memory region: '/nobody'"),
        (("x", "", 0, 8), internal, "Unable to open shared memory region: ''"),
        (("x", key, 0, 3 * PAGE), invalid, "failed to register shared memory region 'x': invalid args"),
        (("x", key, 2 * PAGE - 4, 8), invalid, "failed to register shared memory region 'x': invalid args"),
        (("x", key, 0, 0), invalid, UNMAPPED),
        (("x", key, 8, 8), invalid, UNMAPPED),
        (("ours", other, 0, 8), grpc.StatusCode.ALREADY_EXISTS, "shared memory region 'ours' already in manager"),
    ]
    try:
        async with channel_to(decoupled.grpc_address) as stub:
            await stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest(name="x"))
            await stub.SystemSharedMemoryRegister(region("ours", other, 0, PAGE))
            for arguments, code, text in refused:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await stub.SystemSharedMemoryRegister(region(*arguments))
                assert (error.value.code(), error.value.details()) == (code, text)
            await stub.SystemSharedMemoryRegister(region("x", key, 0, 64))
            for offset, size, text in REACHES:
                assert await stream_answers(stub, reading("x", offset, size)) == [rejected(text)]
            assert await stream_answers(stub, reading("x", 0, 4)) == [data(base_tokens(3), final=True)]
            await stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest(name="x"))
            gone = "Unable to find shared memory region: 'x'"
            assert await stream_answers(stub, reading("x", 0, 4)) == [rejected(gone)]
            await stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest(name="ours"))
    finally:
        for memory in memories:
            memory.close()
            memory.unlink()


PAGE = 4096
UNMAPPED = "failed to register shared memory region 'x': unable to process address spaceInvalid argument"
_BEYOND = "Invalid offset + byte size for shared memory region: 'x'"
REACHES = [
    (0, 65, _BEYOND),
    (61, 4, _BEYOND),
    (0, -4, _BEYOND),
    (64, 4, "Invalid offset for shared memory region: 'x'"),
    (-4, 4, "Invalid offset for shared memory region: 'x'"),
]


def region(name: str, key: str, offset: int, size: int) -> Any:
    return pb.SystemSharedMemoryRegisterRequest(name=name, key=key, offset=offset, byte_size=size)


def reading(name: str, offset: int, size: int) -> Any:
    """A request whose length of the answer lies in a region."""
    request = without(core_request(), 2)
    tensor = request.inputs.add(name="request_output_len", datatype="INT32", shape=(1, 1))
    set_parameter(tensor, "shared_memory_region", name)
    set_parameter(tensor, "shared_memory_offset", offset)
    set_parameter(tensor, "shared_memory_byte_size", size)
    return request


STRINGS: list[tuple[Callable[[bytes], bytes], Any]] = [
    (
        lambda raw: raw + b"x",
        rejected(
            "[request id: r1] incomplete string length indicator for inference input 'text_input' for model "
            "'ensemble', expecting 4 bytes but only 1 bytes available. Please make sure the string length indicator is "
            "in one buffer."
        ),
    ),
    (
        lambda raw: raw * 3,
        rejected(
            "[request id: r1] unexpected number of string elements 2 for inference input 'text_input' for model "
            "'ensemble', expecting 1"
        ),
    ),
    (
        lambda raw: b"",
        rejected(
            "[request id: r1] expected 1 string elements for inference input 'text_input' for model 'ensemble', got 0"
        ),
    ),
    (
        lambda raw: raw[:-1],
        failed(
            "in ensemble 'ensemble', incomplete string data for inference input 'QUERY', expecting string of length 5 "
            "but only 4 bytes available",
            "ensemble",
        ),
    ),
]


@pytest.mark.parametrize(("damaged", "answer"), STRINGS)
async def test_a_damaged_text(decoupled: Lane, whole: Lane, damaged: Callable[[bytes], bytes], answer: Any) -> None:
    """The core counts the strings; that the last one is whole, only the step sees that reads it."""
    request = text_request("hello")
    request.raw_input_contents[0] = damaged(request.raw_input_contents[0])
    async with channel_to(decoupled.grpc_address) as stub:
        assert await stream_answers(stub, request) == [answer]
    async with channel_to(whole.grpc_address) as stub:
        assert await unary_error(stub, request) == (grpc.StatusCode.INVALID_ARGUMENT, answer.error_message)


async def test_a_full_queue(decoupled: Lane) -> None:
    """More than the executor's queue takes are refused at once."""
    text = "Maximum queue size of 32 has been reached, please try again later"
    requests = [core_request(tokens=LONG, request_id=str(number)) for number in range(64 + 32 + 8)]
    async with channel_to(decoupled.grpc_address) as stub:
        call = stub.ModelStreamInfer(iter(requests))
        refused = await call.read()
        call.cancel()
    assert refused == failed(text, request_id=refused.infer_response.id)
    assert classify(text) is Fault.QUEUE_FULL
