"""KServe's calls whose engine, gateway or other replica breaks its protocol: the test is gateway and engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from tritonclient.grpc import service_pb2

from sidecar.backends import wire
from sidecar.backends.http_client import Ending
from sidecar.backends.triton.framing import messages_of
from sidecar.core.effects import Heal, Settle
from sidecar.core.events import RunEnded
from sidecar.fronts.extproc.call_exchange import STREAM, UNARY
from sidecar.replicas import carrying, forwarding
from tests.e2e.envoy.test_calls import calls, tokens_of
from tests.e2e.envoy.test_replicas import aiter_of
from tests.kit.emulated import core_request, running_engine, set_parameter
from tests.kit.picker_house import FD, STREAMED, PickerHouse, entry_of, picker_house, response_body, response_head
from tests.kit.quick_engine import event
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, owned, replicas
from tests.kit.serving import Serving, until, write_adapters
from tests.kit.triton_gateway import (
    ADAPTER,
    FREE,
    FULL,
    MISS,
    answered,
    bytes_of,
    call_answer,
    call_trailers,
    kinds,
    rest_of,
    routed_call,
    status_of,
    triton_house,
)

SHORT_S = 8.0
COMPRESSED = b"\1" + answered()[1:]
GARBAGE = b"\0\0\0\0\3\xff\xff\xff"
OK = 0
paths = pytest.mark.parametrize("path", [UNARY, STREAM], ids=["unary", "stream"])


@pytest.mark.parametrize("lane", ["duplex-streamed", "duplex-duplex"])
async def test_a_unary_call_may_close_its_side_later_than_its_message(tmp_path: Path, lane: str) -> None:
    """Some clients send the end in a frame of its own. The engine waits for it, and the client for the engine."""
    [name] = write_adapters(tmp_path / "adapters", 1)
    async with (
        calls(tmp_path, lane, decoupled=False) as running_calls,
        grpc.aio.insecure_channel(running_calls.address) as channel,
    ):
        method: Any = channel.stream_unary(
            UNARY,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )
        request = core_request("hello", 3, request_id="mine")
        set_parameter(request, "lora_name", name)
        for pause_s in (0.0, 0.5):
            call = method(timeout=10)
            await call.write(request)
            await asyncio.sleep(pause_s)
            await call.done_writing()
            assert (await call).id == "mine"


@paths
@pytest.mark.parametrize("status", [OK, 14])
async def test_an_answer_from_another_engine_is_not_said_to_be_empty(tmp_path: Path, path: str, status: int) -> None:
    """The engine ends its call in trailers after a head, without a message. Another engine has answered meanwhile."""
    async with triton_house(tmp_path, engines=2, decoupled=path == STREAM) as house:
        raw = await routed_call(house, path)
        await raw.send(call_answer(), call_trailers(status, "gone"))
        replies = await rest_of(raw)
        assert bytes_of(replies) or status_of(replies) != OK
        await house.quiet()


@pytest.mark.parametrize("chunk", [COMPRESSED, b"<html>"], ids=["compressed", "html"])
async def test_what_is_no_message_is_no_answer_to_a_unary_call(tmp_path: Path, chunk: bytes) -> None:
    """Envoy lets the engine's bytes go on once the exchange has ended well: a status OK, and bytes of another type."""
    async with triton_house(tmp_path, decoupled=False) as house:
        raw = await routed_call(house, UNARY)
        await raw.send(call_answer(), response_body(chunk), call_trailers(OK))
        try:
            assert status_of(await rest_of(raw)) not in (OK, None)
        except grpc.aio.AioRpcError:
            assert raw.call.done()
        await house.quiet()


async def test_garbage_is_an_error_of_a_unary_call(tmp_path: Path) -> None:
    async with triton_house(tmp_path, decoupled=False) as house:
        raw = await routed_call(house, UNARY)
        await raw.send(call_answer(), response_body(GARBAGE), call_trailers(OK))
        replies = await rest_of(raw)
        assert status_of(replies) not in (OK, None)
        assert bytes_of(replies) == b""
        await house.quiet()


async def test_an_engine_need_not_say_which_message_is_its_last(tmp_path: Path) -> None:
    async with triton_house(tmp_path, decoupled=False) as house:
        raw = await routed_call(house, UNARY)
        await raw.send(call_answer(), response_body(answered(final=None)), call_trailers(OK))
        replies = await rest_of(raw)
        assert status_of(replies) == OK
        assert service_pb2.ModelInferResponse.FromString(bytes_of(replies)[5:]).id == "mine"
        await house.quiet()


@pytest.mark.parametrize("cut", [0, 3, 5])
async def test_an_error_that_comes_in_parts_is_healed_too(tmp_path: Path, cut: int) -> None:
    async with triton_house(tmp_path) as house:
        raw = await routed_call(house, STREAM)
        error = answered(error=MISS)
        await raw.send(call_answer(), response_body(error[:cut]))
        await raw.send(response_body(error[cut:]), call_trailers(OK))
        await rest_of(raw)
        assert house.served.recorder.count(Heal) == 1


@paths
@pytest.mark.parametrize("mode", [STREAMED, FD], ids=["streamed", "duplex"])
@pytest.mark.parametrize("as_status", [False, True], ids=["message", "status"])
async def test_a_full_cache_is_healed_before_the_first_message(
    tmp_path: Path, path: str, mode: Any, as_status: bool
) -> None:
    """As a miss is: the adapter is loaded again once a completion may have left room, and the client gets its tokens.

    A status alone has no body that could be replaced, so the client gets that the request is to be sent again.
    """
    async with triton_house(tmp_path, decoupled=path == STREAM) as house:
        raw = await routed_call(house, path, response_mode=mode)
        if as_status:
            await raw.send(call_answer(status=3 if path == UNARY else 13, text=FULL))
        else:
            await raw.send(call_answer(), response_body(answered(error=FULL)), call_trailers(OK))
        replies = await rest_of(raw)
        await house.quiet(SHORT_S)
        assert "cache_full" in [heal.reason for heal in house.served.recorder.of(Heal)]
        [settled] = house.served.recorder.of(Settle)
        assert settled.reason is None
        if as_status:
            assert status_of(replies) == grpc.StatusCode.UNAVAILABLE.value[0]
        else:
            got = [raw async for raw in messages_of(aiter_of(bytes_of(replies)))]
            if path == STREAM:
                messages = [wire.ModelStreamInferResponse.FromString(raw) for raw in got]
            else:
                [whole] = map(wire.ModelInferResponse.FromString, got)
                messages = [wire.ModelStreamInferResponse(infer_response=whole)]
            assert tokens_of(messages) == house.served.expected(ADAPTER, 3)


async def test_an_error_is_held_whatever_follows_it(tmp_path: Path) -> None:
    async with triton_house(tmp_path) as house:
        raw = await routed_call(house, STREAM)
        await raw.send(call_answer(), response_body(answered(error=MISS)), response_body(answered()), call_trailers(OK))
        replies = await rest_of(raw)
        assert kinds(replies)[-1] == "response_trailers"
        assert bytes_of(replies)
        await house.quiet(SHORT_S)


async def test_a_stream_of_garbage_leaves_nothing(tmp_path: Path) -> None:
    """A gateway without an access log would leak an entry for each."""
    async with triton_house(tmp_path) as house:
        raw = await routed_call(house, STREAM)
        await raw.send(call_answer(), response_body(GARBAGE), call_trailers(OK))
        await rest_of(raw)
        await house.quiet(SHORT_S)


async def test_tokens_are_estimated_where_the_first_message_is_large(tmp_path: Path) -> None:
    """A client asks for logits, which come in many chunks, and its budget is never charged."""
    async with triton_house(tmp_path) as house:
        raw = await routed_call(house, STREAM)
        message = answered(pad_bytes=60_000)
        await raw.send(call_answer(), response_body(message[:16_000]), response_body(message[16_000:]))
        await rest_of(raw)
        await house.tell(entry_of(raw.exchange(), body_bytes=3 * len(message)))
        await house.quiet(SHORT_S)
        [ended] = [each for each in house.served.recorder.events if isinstance(each, RunEnded)]
        assert ended.output_tokens > 0


async def test_tokens_are_estimated_where_the_first_event_is_cut(tmp_path: Path) -> None:
    async with picker_house(tmp_path) as house:
        raw = await house.routed("a00", max_tokens=1000)
        await raw.send(response_head(), response_body(event("x")[:40]), response_body(event("x")[40:]))
        await rest_of(raw)
        await house.tell(entry_of(raw.exchange(), body_bytes=100 * len(event("x"))))
        await house.quiet(SHORT_S)
        [ended] = [each for each in house.served.recorder.events if isinstance(each, RunEnded)]
        assert ended.output_tokens > 0


@pytest.mark.parametrize("kind", ["status", "message"])
async def test_a_miss_elsewhere_corrects_no_belief(tmp_path: Path, kind: str) -> None:
    async with triton_house(tmp_path) as house:
        raw = await routed_call(house, STREAM)
        where = "10.9.9.9:8001"
        if kind == "status":
            await raw.send(call_answer(where, 5, MISS))
        else:
            await raw.send(call_answer(where), response_body(answered(error=MISS)), call_trailers(OK))
        await rest_of(raw)
        assert "engine_miss" not in [heal.reason for heal in house.served.recorder.of(Heal)]


# Replicas.


@asynccontextmanager
async def two_replicas(folder: Path, **engine: Any) -> AsyncIterator[tuple[Serving, PickerHouse]]:
    """Run two before one engine; yield its owner, and the other one, which the gateway asks."""
    write_adapters(folder / "adapters", 1)
    listeners = {"data": FREE, "admin": FREE, "http": FREE, "endpoint_picker": FREE}
    async with (
        running(folder / "redis") as redis,
        running_engine(compute="none", **engine) as triton,
        replicas(2, redis.url, [triton], folder / "adapters", lease_s=CALM_S, listeners=listeners) as pool,
    ):
        [owner] = [served for served in pool if owned(served)]
        [other] = [served for served in pool if not owned(served)]
        async with grpc.aio.insecure_channel(other.sidecar.endpoint_picker_address) as channel:
            yield owner, PickerHouse(other, [triton], channel, folder)


@pytest.mark.parametrize("chunk", [COMPRESSED, GARBAGE], ids=["compressed", "garbage"])
async def test_an_answer_that_the_asked_replica_cannot_read_keeps_no_seat(tmp_path: Path, chunk: bytes) -> None:
    async with two_replicas(tmp_path, decoupled=False) as (owner, house):
        raw = await routed_call(house, UNARY)
        await raw.send(call_answer(), response_body(chunk), call_trailers(OK))
        await asyncio.sleep(1.0)
        raw.call.cancel()
        await until(lambda: not owner.state.requests, SHORT_S)


@pytest.mark.parametrize("is_read", [True, False], ids=["ending", "message"])
async def test_a_sighting_that_is_not_understood_ends_one_request_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_read: bool
) -> None:
    """A newer replica may know endings, or say things, that the owner has never heard of."""
    sent = forwarding.sighting_sent

    def newer(sighting: Any, exchange: str = "") -> Any:
        told = sent(sighting, exchange)
        if told.ending:
            told.ending = "never heard of"
        return told

    async with two_replicas(tmp_path) as (owner, house):
        monkeypatch.setattr(forwarding, "sighting_sent", newer)
        if not is_read:
            monkeypatch.setattr(carrying, "sighting_of", Ending)
        raw = await routed_call(house, STREAM)
        await raw.send(call_answer(), response_body(answered()))
        await rest_of(raw)
        await house.tell(entry_of(raw.exchange(), body_bytes=90))
        await asyncio.sleep(1.0)
        async with asyncio.timeout(SHORT_S):
            assert (await house.served.ask(ADAPTER)).tokens
        await until(lambda: not owner.state.requests, SHORT_S)
