"""Hostile clients of KServe's calls that a gateway asks the endpoint picker about. The test is the gateway."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sidecar.backends.triton.framing import PREFIX
from sidecar.fronts.extproc.call_exchange import STREAM, UNARY
from sidecar.proto import envoy_pb2 as envoy
from tests.kit.picker_house import PickerHouse, Raw, entry_of, request_body, response_body
from tests.kit.serving import until
from tests.kit.triton_gateway import (
    answered,
    asked,
    call_answer,
    call_head,
    kinds,
    rest_of,
    routed_call,
    status_of,
    triton_house,
)

SHORT_S = 8.0
MIB = 1 << 20
paths = pytest.mark.parametrize("path", [UNARY, STREAM], ids=["unary", "stream"])


async def left(house: PickerHouse, raw: Raw) -> None:
    """Have a client leave: Envoy ends its call, and logs that."""
    raw.call.cancel()
    await until(lambda: not house.picker._exchanges, SHORT_S)
    await house.tell(entry_of(raw.exchange()))


@paths
async def test_a_client_that_leaves_before_its_answer_keeps_no_seat(tmp_path: Path, path: str) -> None:
    """It has no deadline. As many of them as there are seats would stop the service for ever."""
    async with triton_house(tmp_path, decoupled=path == STREAM) as house:
        await left(house, await routed_call(house, path))
        await house.quiet(SHORT_S)


async def test_a_client_that_leaves_at_the_head_keeps_no_seat(tmp_path: Path) -> None:
    async with triton_house(tmp_path) as house:
        raw = await routed_call(house, STREAM)
        await raw.send(call_answer())
        assert await raw.next()
        await left(house, raw)
        await house.quiet(SHORT_S)


async def test_a_client_that_leaves_after_the_first_chunk_keeps_no_seat(tmp_path: Path) -> None:
    """What it still sends meanwhile is dropped, and of the two logs' entries the later changes nothing."""
    async with triton_house(tmp_path, listener={"one_request_per_stream": True}) as house:
        raw = await routed_call(house, STREAM, ended=False)
        for _ in range(50):
            await raw.send(request_body(bytes(MIB // 4), False))
        [exchange] = house.picker._exchanges
        await raw.send(call_answer(), response_body(answered()))
        assert kinds(await rest_of(raw)) == ["response_headers", "response_body"]
        assert exchange._pieces.qsize() <= 2
        await house.tell(
            entry_of(raw.exchange(), body_bytes=90),
            entry_of(raw.exchange(), kind=envoy.DOWNSTREAM_PERIODIC, body_bytes=5),
        )
        await house.quiet(SHORT_S)


async def test_a_unary_call_that_sends_on_takes_no_memory(tmp_path: Path) -> None:
    async with triton_house(tmp_path, decoupled=False) as house:
        raw = await routed_call(house, UNARY, ended=False)
        [exchange] = house.picker._exchanges
        for _ in range(100):
            await raw.send(request_body(bytes(MIB // 4), False))
        await asyncio.sleep(0.5)
        assert exchange._pieces.qsize() <= 16


async def test_messages_that_never_come_in_full_are_given_up(tmp_path: Path) -> None:
    """Each may keep 64 MiB, and there may be 65,536."""
    async with triton_house(tmp_path, ARRIVAL_S=1.0, ARRIVING_BYTES_MAX=8 * MIB) as house:
        for _ in range(6):
            raw = house.begin()
            await raw.send(call_head(UNARY), request_body(PREFIX.pack(0, 60 * MIB) + bytes(3 * MIB), False))
        await until(lambda: len(house.picker._exchanges) == 6)
        await asyncio.sleep(3.0)
        assert not house.picker._exchanges


@pytest.mark.parametrize(
    "header",
    [("x-bin", "a"), ("grpc-timeout", "²S"), ("grpc-timeout", "9" * 5000 + "H"), ("grpc-timeout", "9" * 400 + "H")],
    ids=["base64", "digit", "digits", "number"],
)
async def test_odd_headers_of_calls_are_answered(
    tmp_path: Path, header: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """Each of them is a traceback in the log, and Envoy's own 503 without a reason."""
    async with triton_house(tmp_path, decoupled=False) as house:
        raw = house.begin()
        await raw.send(call_head(UNARY, [header]), request_body(asked(UNARY), True))
        assert await raw.next() is not None
        raw.call.cancel()
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_stream_of_two_requests_at_once_is_answered_once(tmp_path: Path) -> None:
    """What is sent after the first request gets no answer by `one_request_per_stream`, whenever it comes."""
    async with triton_house(tmp_path, listener={"one_request_per_stream": True}) as house:
        raw = house.begin()
        await raw.send(call_head(STREAM), request_body(asked(STREAM) * 2, False))
        first = await raw.next()
        assert first is not None
        assert first.WhichOneof("response") == "request_headers", status_of([first])
        raw.call.cancel()


async def test_halves_of_messages_are_put_together(tmp_path: Path) -> None:
    """Of the second one only a half has come when the first goes to its engine."""
    async with triton_house(tmp_path, listener={"one_request_per_stream": True}) as house:
        for cuts in ((3,), (5, 6), (20, 40)):
            body = asked(STREAM) + asked(STREAM)[:20]
            raw = house.begin()
            await raw.send(call_head(STREAM))
            for begin, end in zip((0, *cuts), (*cuts, len(body)), strict=True):
                await raw.send(request_body(body[begin:end], False))
                await asyncio.sleep(0.05)
            first, second = await raw.next(), await raw.next()
            assert first is not None
            assert second is not None
            assert second.request_body.response.body_mutation.streamed_response.end_of_stream
            await raw.send(call_answer(), response_body(answered()))
            await rest_of(raw)
            await house.tell(entry_of(raw.exchange(), body_bytes=90))
            await house.quiet(SHORT_S)
