"""The emulated server as plain clients see it: answers, adapters, streams and cancellation."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as sync_client
import tritonclient.grpc.aio as aio_client

from sidecar.lab.engine.kserve.compute import dummy_token
from sidecar.lab.engine.tokens import BOS, EOS, ByteTokenizer
from tests.kit.emulated import (
    add_lora,
    add_tensor,
    channel_to,
    core_request,
    is_final,
    output_of,
    random_adapter,
    running_engine,
    stream_answers,
    text_of,
    text_request,
    tokens_of,
)

MISS = (
    "Executor failed process requestId {} due to the following error: LoRA task {} not found in cache. "
    "Please send LoRA weights with request"
)


async def test_a_streamed_answer_has_one_response_for_each_token() -> None:
    """Only the last data response carries the final flag set; shapes are those of the real backend."""
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        messages = await stream_answers(stub, core_request(tokens=5, streaming=True, request_id="abc"))
    assert [is_final(message) for message in messages] == [False] * 4 + [True]
    assert {message.infer_response.id for message in messages} == {"abc"}
    assert output_of(messages[0].infer_response, "output_ids").shape == (1, 1, 1)
    assert output_of(messages[0].infer_response, "sequence_length").tolist() == [[1]]


async def test_unstreamed_and_streamed_tokens_are_the_same() -> None:
    """streaming=false gives one response with all tokens."""
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        streamed = await stream_answers(stub, core_request(tokens=6, streaming=True))
        whole = await stream_answers(stub, core_request(tokens=6))
    assert len(whole) == 1
    assert is_final(whole[0])
    assert tokens_of(whole) == tokens_of(streamed)


async def test_the_prompt_is_echoed_unless_excluded() -> None:
    """A whole answer begins with the prompt's tokens by default; a streamed one never has them."""
    prompt = ByteTokenizer().encode("hey")
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        echoed = await stream_answers(stub, core_request("hey", 3, exclude_input=False))
        streamed = await stream_answers(stub, core_request("hey", 3, exclude_input=False, streaming=True))
    assert tokens_of(echoed)[: len(prompt)] == prompt
    assert tokens_of(echoed)[len(prompt) :] == tokens_of(streamed)


async def test_ensemble_answers_in_text() -> None:
    """The ensemble's text is the decoded tokens of the core model, alone and streamed."""
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        tokens = tokens_of(await stream_answers(stub, core_request("hey", 6)))
        whole = await stream_answers(stub, text_request("hey", 6))
        parts = await stream_answers(stub, text_request("hey", 6, streaming=True))
        echoed = await stream_answers(stub, text_request("hey", 6, exclude_input=False))
    text = ByteTokenizer().decode(tokens)
    assert text_of(whole[0].infer_response) == text
    assert "".join(text_of(part.infer_response) for part in parts) == text
    assert text_of(echoed[0].infer_response) == "hey" + text
    assert list(whole[0].infer_response.outputs[0].shape) == [1]


async def test_a_miss_then_weights_then_a_hit() -> None:
    """An unknown id fails before any token; with weights it answers; then the id alone gives the same answer."""
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        missed = await stream_answers(stub, add_lora(core_request(request_id="a"), 7))
        loaded = await stream_answers(stub, add_lora(core_request(), 7, random_adapter(1)))
        hit = await stream_answers(stub, add_lora(core_request(), 7))
        base = await stream_answers(stub, core_request())
    assert [message.error_message for message in missed] == [MISS.format(1, 7)]
    assert missed[0].infer_response.id == "a"
    assert missed[0].infer_response.model_name == "tensorrt_llm"
    assert not missed[0].infer_response.outputs
    assert is_final(missed[0])
    assert tokens_of(hit) == tokens_of(loaded) != tokens_of(base)


async def test_weights_sent_again_are_ignored() -> None:
    """A cached id keeps its first weights, whatever is sent under it."""
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        first = await stream_answers(stub, add_lora(core_request(), 7, random_adapter(1)))
        again = await stream_answers(stub, add_lora(core_request(), 7, random_adapter(2)))
        other = await stream_answers(stub, add_lora(core_request(), 8, random_adapter(2)))
    assert tokens_of(again) == tokens_of(first) != tokens_of(other)


async def test_an_evicted_adapter_is_missed() -> None:
    """With room for two adapters the least recently completed one leaves when a third comes."""
    async with running_engine(lora_host_pages=2) as server, channel_to(server.grpc_address) as stub:
        for task_id in (1, 2, 3):
            await stream_answers(stub, add_lora(core_request(), task_id, random_adapter(task_id)))
        evicted = await stream_answers(stub, add_lora(core_request(), 1))
        kept = await stream_answers(stub, add_lora(core_request(), 2))
    assert evicted[0].error_message == MISS.format(4, 1)
    assert tokens_of(kept)


async def test_weights_without_an_id_are_ignored() -> None:
    """The backend looks for weights only when there is an id: the base model answers, and nobody is told."""
    adapter = random_adapter(1)
    request = core_request()
    add_tensor(request, "lora_weights", "FP16", adapter[0][np.newaxis])
    add_tensor(request, "lora_config", "INT32", adapter[1][np.newaxis])
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        assert tokens_of(await stream_answers(stub, request)) == tokens_of(await stream_answers(stub, core_request()))


async def test_adapters_answer_side_by_side_as_alone() -> None:
    """Requests for three adapters and the base model in one stream each get their own answer."""
    adapters = {task_id: random_adapter(task_id) for task_id in (1, 2, 3)}
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        alone = {
            str(task_id): tokens_of(await stream_answers(stub, add_lora(core_request(), task_id, adapter)))
            for task_id, adapter in adapters.items()
        }
        alone["base"] = tokens_of(await stream_answers(stub, core_request()))
        requests = [add_lora(core_request(request_id=str(task_id)), task_id) for task_id in adapters]
        together = await stream_answers(stub, *requests, core_request(request_id="base"))
    assert {m.infer_response.id: tokens_of([m]) for m in together} == alone


async def test_an_adapter_works_through_the_ensemble() -> None:
    """LoRA inputs of the ensemble reach the same cache; its errors are prefixed."""
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        missed = await stream_answers(stub, add_lora(text_request(), 7))
        loaded = await stream_answers(stub, add_lora(core_request(), 7, random_adapter(1)))
        hit = await stream_answers(stub, add_lora(text_request(), 7))
    assert missed[0].error_message == "in ensemble 'ensemble', " + MISS.format(1, 7)
    assert text_of(hit[0].infer_response) == ByteTokenizer().decode(tokens_of(loaded))


async def test_an_answer_ends_at_the_end_token() -> None:
    """With end_id the answer stops before that token; the last streamed response may then be empty."""
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        free = tokens_of(await stream_answers(stub, core_request(tokens=8)))
        request = core_request(tokens=8, streaming=True)
        add_tensor(request, "end_id", "INT32", np.array([[free[3]]], np.int32))
        ended = await stream_answers(stub, request)
    assert tokens_of(ended) == free[: free.index(free[3])]
    assert is_final(ended[-1])
    assert output_of(ended[-1].infer_response, "output_ids").shape == (1, 1, 0)


async def test_an_answer_is_shortened_to_the_longest_sequence() -> None:
    """The executor lowers the number of new tokens instead of refusing; a long prompt it refuses."""
    options = {"max_input_tokens": 8, "max_seq_tokens": 10}
    async with running_engine(**options) as server, channel_to(server.grpc_address) as stub:
        cut = await stream_answers(stub, core_request("1234567", tokens=50))
        refused = await stream_answers(stub, core_request("12345678", tokens=50))
    assert len(tokens_of(cut)) == 2
    assert "Prompt length (9) exceeds maximum input length (8)" in refused[0].error_message


async def test_unary_on_a_model_that_is_not_decoupled() -> None:
    """ModelInfer answers, errors are INTERNAL, streaming is refused, and no final flag is on a unary answer."""
    async with running_engine(decoupled=False) as server, channel_to(server.grpc_address) as stub:
        response = await stub.ModelInfer(core_request(tokens=3, request_id="u"))
        assert response.id == "u"
        assert not response.parameters
        assert output_of(response, "output_ids").size == 3
        text = await stub.ModelInfer(text_request("hey", 3))
        assert text_of(text)
        with pytest.raises(grpc.aio.AioRpcError) as miss:
            await stub.ModelInfer(add_lora(core_request(), 9))
        assert miss.value.code() is grpc.StatusCode.INTERNAL
        assert miss.value.details() == MISS.format(3, 9)
        with pytest.raises(grpc.aio.AioRpcError) as streaming:
            await stub.ModelInfer(core_request(streaming=True))
        assert streaming.value.code() is grpc.StatusCode.INTERNAL
        assert streaming.value.details() == ("Streaming is only supported if model is deployed using decoupled mode.")


async def test_unary_on_a_decoupled_model_is_refused() -> None:
    """A decoupled model takes streams only."""
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelInfer(core_request())
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert refused.value.details() == "ModelInfer RPC doesn't support models with decoupled transaction policy"


async def test_a_stream_of_a_model_that_is_not_decoupled_answers_in_order() -> None:
    """The short second request waits for the long first one."""
    async with running_engine(decoupled=False) as server, channel_to(server.grpc_address) as stub:
        messages = await stream_answers(
            stub, core_request(tokens=40, request_id="long"), core_request(tokens=1, request_id="short")
        )
    assert [message.infer_response.id for message in messages] == ["long", "short"]
    assert all(is_final(message) for message in messages)


async def test_a_batch_becomes_one_request_for_each_row() -> None:
    """A decoupled model splits a batch; batch_index tells the answers apart, the last one is final."""
    request = core_request()
    del request.inputs[:], request.raw_input_contents[:]
    prompts = [ByteTokenizer().encode("ab"), ByteTokenizer().encode("c")]
    add_tensor(request, "input_ids", "INT32", np.array([prompts[0], [*prompts[1], 0]], np.int32))
    add_tensor(request, "input_lengths", "INT32", np.array([[3], [2]], np.int32))
    add_tensor(request, "request_output_len", "INT32", np.array([[2], [5]], np.int32))
    add_tensor(request, "exclude_input_in_output", "BOOL", np.array([[True], [True]]))
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        messages = await stream_answers(stub, request)
    rows = {int(output_of(m.infer_response, "batch_index")[0, 0]): tokens_of([m]) for m in messages}
    assert {row: len(tokens) for row, tokens in rows.items()} == {0: 2, 1: 5}
    assert [is_final(message) for message in messages] == [False, True]


async def test_a_separate_final_response_comes_to_those_who_ask() -> None:
    """As with Python models: the last data response is not final, an empty one is, on request."""
    async with running_engine(separate_final=True) as server, channel_to(server.grpc_address) as stub:
        silent = await stream_answers(stub, core_request(tokens=2, streaming=True))
        asked = await stream_answers(
            stub, core_request(tokens=2, streaming=True, triton_enable_empty_final_response=True)
        )
    assert [is_final(message) for message in silent] == [False, False]
    assert [is_final(message) for message in asked] == [False, False, True]
    assert not asked[-1].infer_response.outputs
    assert asked[-1].infer_response.id == "r1"


async def test_outputs_on_request() -> None:
    """Counts and times come with their flags; listing outputs without output_ids is an error of the backend."""
    request = core_request("hey", 3)
    for name in ("return_num_input_tokens", "return_num_output_tokens", "return_perf_metrics"):
        add_tensor(request, name, "BOOL", np.array([[True]]))
    partial = core_request(request_id="p")
    partial.outputs.add(name="sequence_length")
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        full = await stream_answers(stub, request)
        refused = await stream_answers(stub, partial)
    response = full[0].infer_response
    assert output_of(response, "num_input_tokens").tolist() == [[4]]
    assert output_of(response, "num_output_tokens").tolist() == [[3]]
    assert "last_token_time_ns" in [output.name for output in response.outputs]
    assert refused[0].error_message.endswith("output_ids tensor must be present in list of output tensors")
    assert is_final(refused[0])


async def test_log_probabilities_are_the_models() -> None:
    """A greedy token is more likely than any other; streamed parts are those of the whole answer."""
    requests = [core_request(tokens=5, streaming=streaming) for streaming in (False, True)]
    for request in requests:
        add_tensor(request, "return_log_probs", "BOOL", np.array([[True]]))
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        whole, parts = [await stream_answers(stub, request) for request in requests]
    probs = output_of(whole[0].infer_response, "output_log_probs", np.float32)
    assert probs.shape == (1, 1, 5)
    assert np.all(probs <= 0)
    assert np.all(probs > -np.log(259))
    total = output_of(whole[0].infer_response, "cum_log_probs", np.float32)
    assert total == pytest.approx(probs.sum(axis=2))
    streamed = [output_of(part.infer_response, "output_log_probs", np.float32) for part in parts]
    assert np.concatenate(streamed, axis=2) == pytest.approx(probs)


@pytest.mark.parametrize("flag", ["return_context_logits", "return_generation_logits", "return_log_probs"])
async def test_what_is_not_computed_is_refused(flag: str) -> None:
    """Logits are never made up, nor probabilities by an engine that computes nothing."""
    request = core_request()
    add_tensor(request, flag, "BOOL", np.array([[True]]))
    async with running_engine(compute="none") as server, channel_to(server.grpc_address) as stub:
        messages = await stream_answers(stub, request)
    assert flag in messages[0].error_message
    assert is_final(messages[0])


async def test_stop_ends_a_running_request() -> None:
    """stop=true with a live id ends that request, is answered by an empty final response, and frees the adapter."""
    options = {"compute": "none", "max_seq_tokens": 1_000_000}
    async with running_engine(**options) as server, channel_to(server.grpc_address) as stub:
        call = stub.ModelStreamInfer()
        request = add_lora(core_request(tokens=900_000, streaming=True, request_id="x"), 3, random_adapter(3))
        await call.write(request)
        first = await call.read()
        stop = core_request(request_id="x", tokens=1)
        add_tensor(stop, "stop", "BOOL", np.array([[True]]))
        answered = await stream_answers(stub, stop)
        await call.done_writing()
        last = (await _rest(call))[-1]
        unknown = await stream_answers(stub, _stopping("nobody"))
        nameless = await stream_answers(stub, _stopping(""))
    assert not is_final(first)
    assert is_final(last)
    assert output_of(last.infer_response, "output_ids").size == 0
    assert [is_final(message) for message in answered + unknown] == [True, True]
    assert not answered[0].infer_response.outputs
    assert not answered[0].error_message
    assert nameless[0].error_message == "Trying to stop a request but request ID is not provided"
    assert [served.outcome for served in server.served] == ["cancelled"]


async def test_leaving_frees_the_seat_and_the_adapter() -> None:
    """A client that cancels its stream lets the next one run, on an engine with one seat and one page."""
    options = {"compute": "none", "seats": 1, "lora_host_pages": 1, "max_seq_tokens": 1_000_000}
    async with running_engine(**options) as server, channel_to(server.grpc_address) as stub:
        call = stub.ModelStreamInfer()
        await call.write(add_lora(core_request(tokens=900_000, streaming=True), 3, random_adapter(3)))
        await call.read()
        call.cancel()
        messages = await stream_answers(stub, add_lora(core_request(), 4, random_adapter(4)))
    assert tokens_of(messages) == [dummy_token(4, position) for position in range(8)]
    assert [served.outcome for served in server.served] == ["cancelled", "done"]


async def test_leaving_a_unary_call_frees_the_seat() -> None:
    """Cancelling ModelInfer cancels in the executor, whether running or queued."""
    options = {"compute": "none", "seats": 1, "decoupled": False, "max_seq_tokens": 1_000_000}
    async with running_engine(**options) as server, channel_to(server.grpc_address) as stub:
        running = stub.ModelInfer(text_request(tokens=900_000))
        await _until(lambda: server.engine.counters.active == 1)
        queued = stub.ModelInfer(core_request(tokens=900_000))
        await _until(lambda: server.engine.counters.waiting == 1)
        queued.cancel()
        running.cancel()
        assert output_of(await stub.ModelInfer(core_request(tokens=2)), "output_ids").size == 2
    assert sorted(served.outcome for served in server.served) == ["cancelled", "cancelled", "done"]


async def test_an_error_leaves_the_stream_usable() -> None:
    """After a rejection and a miss the same stream still answers."""
    bad = core_request(request_id="bad")
    bad.inputs[0].datatype = "INT64"
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        call = stub.ModelStreamInfer()
        await call.write(bad)
        assert (await call.read()).error_message
        await call.write(add_lora(core_request(request_id="miss"), 5))
        assert (await call.read()).error_message == MISS.format(1, 5)
        await call.write(core_request(request_id="good"))
        assert tokens_of([await call.read()])
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_real_grpc_errors_end_the_stream() -> None:
    """With the metadata triton_grpc_error an error is a status and nothing else on the stream is answered."""
    async with running_engine() as server, channel_to(server.grpc_address) as stub:
        call = stub.ModelStreamInfer(metadata=(("triton_grpc_error", "true"),))
        await call.write(add_lora(core_request(), 5))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
    assert error.value.code() is grpc.StatusCode.INTERNAL
    assert error.value.details() == MISS.format(1, 5)


async def test_dummy_tokens_tell_adapters_apart() -> None:
    """Without compute an engine of real size takes real adapters and answers by task id and position."""
    options = {"shape": "llama-3.1-8b", "lora_modules": ("attn_q", "attn_v")}
    adapter = random_adapter(1, shape="llama-3.1-8b", rank=8)
    async with running_engine(**options) as server, channel_to(server.grpc_address) as stub:
        loaded = await stream_answers(stub, add_lora(core_request(), 11, adapter))
        base = await stream_answers(stub, core_request())
    assert tokens_of(loaded) == [dummy_token(11, position) for position in range(8)]
    assert tokens_of(base) == [dummy_token(0, position) for position in range(8)]


async def _rest(call: Any) -> list[Any]:
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def _until(is_so: Callable[[], bool]) -> None:
    """Let the event loop run until the engine has come to a state."""
    while not is_so():
        await asyncio.sleep(0)


def _stopping(request_id: str) -> Any:
    request = core_request(request_id=request_id)
    add_tensor(request, "stop", "BOOL", np.array([[True]]))
    return request


def _client_inputs(client: Any, streaming: bool) -> list[Any]:
    ids = np.array([[BOS, *b"hello"]], np.int32)
    values = {
        "input_ids": ("INT32", ids),
        "input_lengths": ("INT32", np.array([[ids.shape[1]]], np.int32)),
        "request_output_len": ("INT32", np.array([[4]], np.int32)),
        "end_id": ("INT32", np.array([[EOS]], np.int32)),
        "streaming": ("BOOL", np.array([[streaming]])),
    }
    inputs = []
    for name, (datatype, array) in values.items():
        tensor = client.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


async def test_tritonclient_streams_with_callbacks() -> None:
    """NVIDIA's blocking client gets its results and, for a miss, `(None, error)`."""
    async with running_engine() as server:
        results = await asyncio.to_thread(_blocking_stream, server.grpc_address)
    tokens = [int(result.as_numpy("output_ids")[0, 0, 0]) for result, error in results[:4] if error is None]
    assert len(tokens) == 4
    assert results[4][0] is None
    assert "not found in cache" in results[4][1].message()


def _blocking_stream(address: str) -> list[Any]:
    import queue

    results: queue.Queue[Any] = queue.Queue()
    with sync_client.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: results.put((result, error)))
        client.async_stream_infer("tensorrt_llm", _client_inputs(sync_client, True), request_id="s1")
        received = [results.get() for _ in range(4)]
        task = sync_client.InferInput("lora_task_id", [1, 1], "UINT64")
        task.set_data_from_numpy(np.array([[77]], np.uint64))
        client.async_stream_infer("tensorrt_llm", [*_client_inputs(sync_client, True), task], request_id="s2")
        received.append(results.get())
        client.stop_stream()
    return received


async def test_tritonclient_infers_unary() -> None:
    """NVIDIA's asyncio client gets an answer from a model that is not decoupled."""
    async with running_engine(decoupled=False) as server:
        client = aio_client.InferenceServerClient(server.grpc_address)
        result = await client.infer("tensorrt_llm", _client_inputs(aio_client, False), request_id="u1")
        await client.close()
    assert result.as_numpy("output_ids").shape == (1, 1, 6 + 4)


@pytest.mark.parametrize("scheduler", ["guaranteed_no_evict", "max_utilization"])
async def test_every_answer_is_right_while_adapters_come_and_go(scheduler: str) -> None:
    """Twelve adapters share a cache of three among concurrent clients, some of whom leave: no answer is another's."""
    adapters = {task_id: random_adapter(task_id) for task_id in range(1, 13)}
    options = {"lora_host_pages": 3, "lora_device_pages": 2, "seats": 4, "kv_blocks": 10, "tokens_per_block": 4}
    async with running_engine(**options, scheduler=scheduler) as server, channel_to(server.grpc_address) as stub:
        truth = {
            task_id: tokens_of(await stream_answers(stub, add_lora(core_request(), task_id, adapter)))
            for task_id, adapter in adapters.items()
        }
        randoms = random.Random(7)
        order = [randoms.randint(1, 12) for _ in range(80)]
        answers = await asyncio.gather(
            *(_persist(stub, task_id, adapters[task_id], leaves=n % 5 == 0) for n, task_id in enumerate(order))
        )
        counters = server.engine.counters
    assert answers == [truth[task_id] for task_id in order]
    assert (counters.active, counters.waiting, counters.kv_used_blocks) == (0, 0, 0)
    assert counters.host_evictions > 9


async def _persist(stub: Any, task_id: int, adapter: Any, leaves: bool) -> list[int]:
    """Ask until there is an answer: with weights after a miss, again when the cache is full."""
    if leaves:
        call = stub.ModelStreamInfer()
        await call.write(add_lora(core_request(streaming=True), task_id, adapter))
        call.cancel()
    carried = None
    while True:
        messages = await stream_answers(stub, add_lora(core_request(), task_id, carried))
        error = messages[-1].error_message
        if not error:
            return tokens_of(messages)
        assert "not found in cache" in error or "no done tasks" in error or "pageIds" in error
        if "not found in cache" in error:
            carried = adapter
