"""`stop=true` and clients that go away: a request is cancelled by its client's own id, queued or running."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import tritonclient.grpc as triton

from tests.kit.emulated import channel_to, core_request, is_final, running_engine, stream_answers
from tests.kit.kserve_clients import (
    CORE,
    DUMMY,
    ENSEMBLE,
    OpenStream,
    aio_client,
    inputs_of,
    parameters_of,
    stop_inputs,
    tokens_of,
)
from tests.kit.serving import Serving, serving, until, write_adapters

LONG = 4000
END: Any = grpc.aio.EOF
ONE_SEAT = {"engine": {"seats": 1}}


async def running(engine: Any, served: Serving) -> None:
    """Wait until a request with its adapter runs at the engine, and nothing is loaded beside it."""
    await until(lambda: engine.engine.counters.active == 1 and bool(served.state.requests) and not served.state.loads)


def all_gone(engine: Any, served: Serving) -> bool:
    gateway = served.sidecar.gateway
    return engine.engine.counters.active == 0 and not served.state.requests and not gateway.tickets


def check_stopped(response: Any) -> None:
    """A stopped request ends as in the engine: finally, without an error, with the tensors that carry no token."""
    assert parameters_of(response)["triton_final_response"] is True
    result = triton.InferResult(response)
    if response.model_name == CORE:
        assert result.as_numpy("output_ids").shape == (1, 1, 0)
        assert result.as_numpy("sequence_length").tolist() == [[0]]
    else:
        assert result.as_numpy("text_output").tolist() == [b""]


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("situation", ["same stream", "other stream", "unary"])
@pytest.mark.parametrize("model", [CORE, ENSEMBLE])
async def test_stop_ends_a_request(tmp_path: Path, model: str, situation: str, queued: bool) -> None:
    """Queued or running, by the same stream, another one of the connection, or a unary call."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, seats=1, time_scale=0.2) as engine,
        serving([engine], tmp_path, backend=ONE_SEAT) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        stream = OpenStream(client)
        if queued:
            stream.send("a00", "first", LONG)
            await running(engine, served)
        stream.send("a00", "mine", LONG, model)
        await until(lambda: served.state.queued == 1) if queued else await running(engine, served)
        if not queued:
            response, _ = await stream.take()
            assert tokens_of(response) == served.expected("a00", 1)

        if situation == "same stream":
            stream.stop("mine")
        elif situation == "other stream":
            other = OpenStream(client)
            other.stop("mine")
            told = await other.rest()
            assert (told.errors, [response.id for response in told.responses]) == ([], ["mine"])
            assert told.last == {"triton_final_response": True}
        else:
            answer = (await client.infer(CORE, stop_inputs(), request_id="mine")).get_response()
            assert (answer.id, len(answer.outputs)) == ("mine", 0)

        ends = await ends_of(stream, "mine", 2 if situation == "same stream" else 1)
        (stopped,) = [response for response in ends if response.outputs]
        check_stopped(stopped)
        assert ("lora_version" in parameters_of(stopped)) == (not queued)
        if queued:
            stream.stop("first")
            check_stopped(next(r for r in await ends_of(stream, "first", 2) if r.outputs))
        assert (await stream.rest()).responses == []
        await until(lambda: all_gone(engine, served))
        assert not [record for record in engine.served if record.outcome == "error"]


async def ends_of(stream: OpenStream, request_id: str, count: int) -> list[Any]:
    """Take answers until so many final ones of an id have come; return those."""
    ends: list[Any] = []
    while len(ends) < count:
        response, error = await stream.take()
        assert error is None
        if response.id == request_id and parameters_of(response).get("triton_final_response"):
            ends.append(response)
    return ends


async def test_the_engine_itself_ends_a_stopped_request_like_that(tmp_path: Path) -> None:
    """The same program against the engine and the sidecar sees the same responses, up to what the sidecar adds."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, time_scale=0.2) as engine,
        serving([engine], tmp_path) as served,
    ):
        seen = []
        for address in (engine.grpc_address, served.sidecar.data_address):
            async with channel_to(address) as stub:
                call = stub.ModelStreamInfer()
                await call.write(core_request(tokens=LONG, streaming=True, request_id="s"))
                first = await call.read()
                await call.write(stop_request("s"))
                await call.done_writing()
                ends = [message for message in await rest_of(call) if is_final(message)]
                seen.append(
                    (
                        [output.name for output in first.infer_response.outputs],
                        sorted(shape_of(message) for message in ends),
                        [message.error_message for message in ends],
                    )
                )
        assert seen[0] == seen[1]


async def rest_of(call: Any) -> list[Any]:
    messages: list[Any] = []
    while (message := await call.read()) is not END:
        messages.append(message)
    return messages


def stop_request(request_id: str) -> Any:
    request = core_request(tokens=1, request_id=request_id)
    request.inputs.add(name="stop", datatype="BOOL", shape=[1, 1])
    request.raw_input_contents.append(b"\1")
    return request


def shape_of(message: Any) -> list[Any]:
    response = message.infer_response
    outputs = zip(response.outputs, response.raw_output_contents, strict=True)
    return [
        response.model_name,
        response.model_version,
        response.id,
        *((output.name, output.datatype, list(output.shape), data) for output, data in outputs),
    ]


@pytest.mark.parametrize("queued", [False, True])
async def test_stop_ends_a_unary_request(tmp_path: Path, queued: bool) -> None:
    """A unary call that is stopped by another call of the connection returns an answer, not an error."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, seats=1, time_scale=0.2, decoupled=False) as engine,
        serving([engine], tmp_path, backend=ONE_SEAT) as served,
        aio_client(served.sidecar.data_address) as client,
    ):

        def call(request_id: str) -> asyncio.Task[Any]:
            inputs = inputs_of(CORE, LONG, streaming=False)
            sent = client.infer(CORE, inputs, request_id=request_id, parameters={"lora_name": "a00"})
            return asyncio.ensure_future(sent)

        first = call("first")
        await running(engine, served)
        mine = first
        if queued:
            mine = call("mine")
            await until(lambda: served.state.queued == 1)
        for request_id in ("unknown", "mine" if queued else "first"):
            await client.infer(CORE, stop_inputs(), request_id=request_id)
        response = (await mine).get_response()
        assert tokens_of(response) == []
        assert response.id == ("mine" if queued else "first")
        if queued:
            assert not first.done()
            await client.infer(CORE, stop_inputs(), request_id="first")
            await first
        await until(lambda: all_gone(engine, served))


async def test_a_stop_means_the_clients_own_request(tmp_path: Path) -> None:
    """Another connection's, another tenant's and another stream's request with the same id runs on."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, time_scale=0.2) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address, channel_args=[("grpc.use_local_subchannel_pool", 1)]) as one,
        aio_client(served.sidecar.data_address, channel_args=[("grpc.use_local_subchannel_pool", 1)]) as two,
    ):
        foreign, tenant, sibling, own = OpenStream(two), OpenStream(one), OpenStream(one), OpenStream(one)
        others = [foreign, tenant, sibling]
        foreign.send("a00", "x", 60)
        tenant.send("a00", "x", 60, parameters={"lora_tenant": "blue"})
        own.send("a00", "x", LONG)
        await own.take()
        sibling.send("a00", "x", 60)
        for stream in others:
            await stream.take()
        own.stop("x")
        ends = await ends_of(own, "x", 2)
        check_stopped(next(response for response in ends if response.outputs))
        for stream in others:
            told = await stream.take_final("x")
            assert (told.errors, len(told.tokens())) == ([], 59)
        for stream in (*others, own):
            assert (await stream.rest()).responses == []


async def test_stop_without_an_id_and_with_an_unknown_one() -> None:
    """No id is an error with the engine's words; an unknown one may have ended and is none."""
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine]) as served,
        channel_to(served.sidecar.data_address) as stub,
        channel_to(engine.grpc_address) as direct,
    ):
        for request_id in ("", "ended"):
            (expected,) = await stream_answers(direct, stop_request(request_id))
            (answer,) = await stream_answers(stub, stop_request(request_id))
            assert expected.error_message in answer.error_message
            assert bool(answer.error_message) == (request_id == "")
            assert answer.infer_response.id == request_id
        assert shape_of(answer) == shape_of(expected)


async def test_colliding_ids_within_a_stream_are_stopped_one_by_one(tmp_path: Path) -> None:
    """The newest first; each stop ends one, and the rest can still be stopped."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, time_scale=0.2) as engine,
        serving([engine], tmp_path) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        stream = OpenStream(client)
        for _ in range(3):
            stream.send("a00", "x", LONG)
        await until(lambda: engine.engine.counters.active == 3)
        stream.stop("x")
        await ends_of(stream, "x", 2)
        await until(lambda: engine.engine.counters.active == 2)
        stream.stop("x")
        stream.stop("x")
        await ends_of(stream, "x", 4)
        assert (await stream.rest()).responses == []
        await until(lambda: all_gone(engine, served))


@pytest.mark.parametrize("model", [CORE, ENSEMBLE])
async def test_a_client_that_leaves_mid_stream_frees_its_seat(tmp_path: Path, model: str) -> None:
    """By cancelling its stream, with one request running and one waiting: the engine and the pins are free again."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, seats=1, time_scale=0.2) as engine,
        serving([engine], tmp_path, backend=ONE_SEAT) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        stream = OpenStream(client)
        stream.send("a00", "1", LONG, model)
        await stream.take()
        stream.send("a00", "2", LONG, model)
        await until(lambda: served.state.queued == 1)
        stream.cancel()
        await until(lambda: all_gone(engine, served))
        assert all(not entry.pins for entry in served.state.store.entries.values())
        assert (await served.ask("a00", 2)).tokens == served.expected("a00", 2)


async def test_a_client_whose_unary_call_times_out_frees_its_seat(tmp_path: Path) -> None:
    """The call's own deadline ends the request in the queue and at the engine."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, seats=1, time_scale=0.2, decoupled=False) as engine,
        serving([engine], tmp_path, backend=ONE_SEAT) as served,
        channel_to(served.sidecar.data_address) as stub,
    ):
        request = core_request(tokens=LONG, lora_name="a00")
        calls = [asyncio.ensure_future(stub.ModelInfer(request, timeout=seconds)) for seconds in (2.0, 1.0)]
        await asyncio.wait(calls)
        assert [call.exception().code().name for call in calls] == ["DEADLINE_EXCEEDED"] * 2  # type: ignore[union-attr]
        await until(lambda: all_gone(engine, served))


async def test_a_deadline_in_the_queue_of_a_stream(tmp_path: Path) -> None:
    """`lora_deadline_ms` ends a waiting request as a message, and the one that runs goes on."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, seats=1, time_scale=0.2) as engine,
        serving([engine], tmp_path, backend=ONE_SEAT) as served,
        aio_client(served.sidecar.data_address) as client,
    ):
        stream = OpenStream(client)
        stream.send("a00", "long", LONG)
        await running(engine, served)
        stream.send("a00", "short", 1, parameters={"lora_deadline_ms": 50})
        while True:
            response, error = await stream.take()
            if error is not None:
                break
            assert response.id == "long"
        assert error.startswith("[EXPIRED] a00: the request waited")
        stream.stop("long")
        await ends_of(stream, "long", 2)
        await stream.rest()
