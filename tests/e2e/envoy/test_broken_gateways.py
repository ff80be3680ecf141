"""Gateways that break Envoy's order of messages, and access logs that lie. The test is the gateway."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from sidecar.backends import unseen
from sidecar.core.events import RunEnded
from sidecar.fronts.extproc import access_log
from sidecar.fronts.extproc import exchange as exchanges
from sidecar.proto import envoy_pb2 as envoy
from tests.kit.odd_engine import EVENTS_HEAD, Asked
from tests.kit.picker_house import (
    FD,
    PickerHouse,
    Raw,
    body_of,
    entry_of,
    head_of,
    picker_house,
    request_body,
    response_body,
    response_head,
)
from tests.kit.quick_engine import DONE, chunked, event
from tests.kit.serving import until

EVENT = event("x")
SHORT_S = 8.0
TRAILERS = envoy.ProcessingRequest(response_trailers=envoy.HttpTrailers())
LEAK = "the exchange is not ended when its reader fails"


async def to_its_end(raw: Raw) -> None:
    """Read a call to its end, whatever that is."""
    try:
        while await raw.next() is not None:
            pass
    except grpc.aio.AioRpcError:
        assert raw.call.done()


async def let_go(house: PickerHouse, *head: Any, chunk: bytes = EVENT, **fields: Any) -> Raw:
    """Have an answer begin whose rest goes past."""
    raw = await house.routed("a00", *head, **fields)
    await raw.send(response_head(), response_body(chunk))
    await to_its_end(raw)
    await until(lambda: house.picker.log.unseen > 0)
    return raw


async def test_a_chunk_before_the_head_keeps_no_seat(tmp_path: Path) -> None:
    async with picker_house(tmp_path) as house:
        raw = await house.routed("a00")
        await raw.send(response_body(EVENT))
        await to_its_end(raw)
        await house.quiet(SHORT_S)


async def test_a_chunk_while_the_request_is_held_leaves_nothing(tmp_path: Path) -> None:
    async with picker_house(tmp_path) as house:
        raw = house.begin()
        await raw.send(head_of(), response_body(EVENT))
        await to_its_end(raw)
        await house.quiet(SHORT_S)


async def test_a_header_that_http_does_not_have_leaves_nothing(tmp_path: Path) -> None:
    async with picker_house(tmp_path) as house:
        raw = house.begin()
        await raw.send(head_of([("中", "1")]))
        await to_its_end(raw)
        await house.quiet(SHORT_S)


async def test_an_answer_that_is_given_up_frees_its_seat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of ours that is too long to be kept ends with the client's request, and so does its engine's run."""
    monkeypatch.setattr(exchanges, "OWN_BYTES_MAX", 2000)

    async def endless(asked: Asked) -> None:
        asked.write(EVENTS_HEAD)
        while not asked.ended.is_set():
            asked.write(chunked(EVENT))
            await asyncio.sleep(0.02)

    async with picker_house(tmp_path) as house:
        house.engines[0].answer = endless
        raw = await house.routed("a00")
        await raw.send(response_head(503))
        await to_its_end(raw)
        assert await raw.ended() == grpc.StatusCode.ABORTED
        await house.quiet(SHORT_S)


async def test_without_a_log_an_answer_that_ends_in_its_first_chunk_leaves_nothing(tmp_path: Path) -> None:
    """The lane works without an access log; each such answer keeps an entry, and counts as unseen, for ever."""
    async with picker_house(tmp_path) as house:
        raw = await house.routed("a00")
        await raw.send(response_head(), response_body(EVENT + DONE))
        await to_its_end(raw)
        await until(lambda: not house.served.state.requests)
        await house.quiet(SHORT_S)


async def test_a_log_that_tells_seldom_ends_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway may log how far its answers are once a minute. Their engine's gauge says that it has both."""
    monkeypatch.setattr(unseen, "QUIET_S", 0.5)
    monkeypatch.setattr(access_log, "LOST_S", 1.0)
    async with picker_house(tmp_path) as house:
        seldom, often = await let_go(house), await let_go(house)
        house.engines[0].running = 2
        await house.tell(entry_of(seldom.exchange(), kind=envoy.DOWNSTREAM_PERIODIC, body_bytes=200))
        for _ in range(10):
            await house.tell(entry_of(often.exchange(), kind=envoy.DOWNSTREAM_PERIODIC, body_bytes=200))
            await asyncio.sleep(0.3)
        assert len(house.served.state.requests) == 2
        await house.tell(entry_of(seldom.exchange()), entry_of(often.exchange()))
        await house.quiet()


@pytest.mark.parametrize("order", ["end first", "periodic first", "mixed"])
async def test_the_entries_of_two_logs_come_in_any_order(tmp_path: Path, order: str) -> None:
    """An end is counted once, with its own bytes, and nothing that comes later is."""
    async with picker_house(tmp_path) as house:
        raw = await let_go(house, max_tokens=100)
        end = entry_of(raw.exchange(), body_bytes=10 * len(EVENT) + len(DONE))
        far, near = (entry_of(raw.exchange(), envoy.DOWNSTREAM_PERIODIC, count * len(EVENT)) for count in (7, 3))
        told = {"end first": (end, far, near), "periodic first": (far, near, end), "mixed": (near, end, far, end)}
        for entry in told[order]:
            await house.tell(entry)
        await house.quiet()
        [ended] = [each for each in house.served.recorder.events if isinstance(each, RunEnded)]
        assert ended.output_tokens == 10
        assert house.picker.log.entries["used"] + house.picker.log.entries["unknown"] == len(told[order])


@pytest.mark.parametrize("kind", [7, 8, 10], ids=["upstream-pool-ready", "upstream-periodic", "tunnel-established"])
async def test_only_an_end_ends(tmp_path: Path, kind: int) -> None:
    """The router's own access log tells of the engine's side, by the same exchange, while the answer runs."""
    async with picker_house(tmp_path) as house:
        raw = await let_go(house)
        entry = entry_of(raw.exchange())
        entry.common_properties.access_log_type = kind  # type: ignore[assignment]
        await house.tell(entry)
        await asyncio.sleep(0.3)
        assert house.served.state.requests
        await house.tell(entry_of(raw.exchange()))
        await house.quiet()


async def test_a_log_that_lies_charges_no_more_than_was_asked_for(tmp_path: Path) -> None:
    """A tenant with a budget would be shut out for years."""
    limits = {"limits": [{"tenant": "acme", "tokens_per_minute": 100_000}]}
    async with picker_house(tmp_path, access=limits, listener={"estimates_allowed": True}) as house:
        raw = await let_go(house, [("x-lora-tenant", "acme")])
        await house.tell(entry_of(raw.exchange(), body_bytes=2**63))
        await house.quiet()
        ended = next(each for each in house.served.recorder.events if isinstance(each, RunEnded))
        assert ended.output_tokens <= 100


async def test_a_deadline_that_envoy_ends_is_no_loss_of_an_engine(tmp_path: Path) -> None:
    """Envoy's timeout is the client's deadline, and at times the sooner of the two. Nothing is sent again then."""
    async with picker_house(tmp_path) as house:
        raw = await house.routed("a00", [("x-lora-deadline-ms", "5000")])
        await raw.send(response_head(504, attributes={"response.code_details": "response_timeout"}))
        reply = await raw.next()
        assert reply is not None
        assert house.engines[0].asked == []
        assert reply.immediate_response.status.code == 504
        await house.quiet()


async def test_entries_twice_early_late_and_for_others_change_nothing(tmp_path: Path) -> None:
    """An answer whose end is told before its head has its seat until it has begun; nobody is confused by the rest."""
    async with picker_house(tmp_path) as house:
        raw = await house.routed("a00")
        mark = dict(raw.exchange())
        for replica in ("other", "\0", "é" * 1000):
            await house.tell(entry_of({**mark, "replica": replica}))
        odd = envoy.HttpEntry()
        odd.common_properties.metadata.filter_metadata["lora"].update({"exchange": 5, "replica": {"a": 1}})
        await house.tell(odd, envoy.HttpEntry())
        await house.tell(entry_of(mark), entry_of(mark))
        await asyncio.sleep(0.2)
        assert len(house.served.state.requests) == 1
        await raw.send(response_head(), response_body(EVENT))
        await to_its_end(raw)
        await house.tell(entry_of(mark), entry_of(mark, body_bytes=2**64 - 1))
        await house.quiet()


@pytest.mark.parametrize(
    "mode",
    [
        FD,
        envoy.STREAMED,
        envoy.NONE,
        envoy.BUFFERED,
    ],
)
async def test_messages_out_of_order_and_twice_leave_nothing(tmp_path: Path, mode: Any) -> None:
    """Heads twice, requests' parts after the answer's, ends twice, trailers at once: no seat stays."""
    orders = [
        [head_of(), response_head(), response_head(), response_body(EVENT, True)],
        [
            response_head(),
            body_of("a00"),
            request_body(b"x", True),
            response_body(EVENT, True),
            response_body(b"", True),
        ],
        [TRAILERS, response_head(ended=True)],
        [response_head(ended=True), response_body(b"", True)],
        [envoy.ProcessingRequest(request_trailers=envoy.HttpTrailers()), response_head(), TRAILERS],
    ]
    async with picker_house(tmp_path) as house:
        for order in orders:
            raw = await house.routed("a00", response_mode=mode)
            try:
                await raw.send(*order)
            except grpc.aio.AioRpcError:
                assert raw.call.done()
            await asyncio.sleep(0.2)
            raw.call.cancel()
            await house.tell(entry_of(raw.exchange()))
            await house.quiet()


async def test_calls_that_begin_wrongly_are_refused(tmp_path: Path) -> None:
    async with picker_house(tmp_path) as house:
        observing, untold, streamed = head_of(), head_of(), head_of(request_mode=envoy.STREAMED)
        observing.observability_mode = True
        untold.ClearField("protocol_config")
        for first in (envoy.ProcessingRequest(), request_body(b"x", True), TRAILERS, observing):
            raw = house.begin()
            await raw.send(first)
            await to_its_end(raw)
            assert await raw.ended() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
        for first in (untold, streamed):
            raw = house.begin()
            await raw.send(first)
            reply = await raw.next()
            assert reply is not None
            assert reply.immediate_response.status.code == 500
            await to_its_end(raw)
        large = head_of()
        large.metadata_context.filter_metadata["envoy.lb"].update({"x": "y" * 100_000})
        raw = house.begin()
        await raw.send(large, body_of("a00"))
        assert await raw.until_routed()
        raw.call.cancel()
        await house.quiet()


@pytest.mark.nightly
async def test_silent_calls_are_given_up(tmp_path: Path) -> None:
    """Three thousand heads without bodies; each has its time to arrive."""
    async with picker_house(tmp_path) as house:
        raws = [house.begin() for _ in range(3000)]
        for raw in raws:
            await raw.send(head_of())
        await until(lambda: len(house.picker._exchanges) > 2000)
        await house.quiet(90)
        assert (await (await house.routed("a00")).call.initial_metadata()) is not None
