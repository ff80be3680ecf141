"""Two replicas lose each other while an answer goes past both. The test is the gateway, and cuts their connection."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from sidecar.backends.api import Ticket
from sidecar.core.enums import Seen
from sidecar.core.events import ClientLeft, RunEnded
from sidecar.fronts.extproc.call_exchange import STREAM
from sidecar.proto import admin_pb2, admin_pb2_grpc, peers_pb2
from sidecar.proto import envoy_pb2 as envoy
from sidecar.replicas.carrying import RemoteCarrier
from sidecar.telling.record import Record, timeline_of
from tests.kit.emulated import running_engine
from tests.kit.odd_engine import odd_engine
from tests.kit.picker_house import PickerHouse, Raw, entry_of, response_body, response_head
from tests.kit.quick_engine import DONE, event
from tests.kit.redis_servers import Proxy, running
from tests.kit.replica_pool import CALM_S, owned, replicas
from tests.kit.serving import Serving, until, write_adapters
from tests.kit.triton_gateway import ADAPTER, FREE, answered, asked, call_answer, rest_of, routed_call
from tests.kit.trtllm_emulated import BASE_CONFIG

SHORT_S = 8.0
EVENTS, CALLS = "events", "calls"
PIECE = {EVENTS: event("x"), CALLS: answered()}
TAIL = {EVENTS: DONE, CALLS: b""}
kinds = pytest.mark.parametrize("kind", [EVENTS, CALLS])


@dataclass
class Apart:
    """The replica that owns the engine, the one that the gateway asks, and what is between them."""

    owner: Serving
    asked: PickerHouse
    between: Proxy
    kind: str

    async def routed(self) -> Raw:
        if self.kind == EVENTS:
            return await self.asked.routed(ADAPTER, max_tokens=1000)
        return await routed_call(self.asked, STREAM, asked(STREAM, 1000))

    async def let_go(self) -> Raw:
        """Begin an answer whose rest goes past both, and return once both know that."""
        raw = await self.routed()
        await raw.send(response_head() if self.kind == EVENTS else call_answer(), response_body(PIECE[self.kind]))
        await rest_of(raw)
        tickets, others = (served.sidecar.gateway.tickets for served in (self.owner, self.asked.served))
        await until(lambda: any(goes_on(ticket) for ticket in tickets.values()))
        await until(lambda: any(ticket.came for ticket in others.values()))
        return raw

    async def tell(self, raw: Raw, pieces: int, kind: Any = envoy.DOWNSTREAM_END) -> None:
        size_bytes = pieces * len(PIECE[self.kind]) + len(TAIL[self.kind])
        await self.asked.tell(entry_of(raw.exchange(), kind, size_bytes))


@asynccontextmanager
async def apart(folder: Path, kind: str) -> AsyncIterator[Apart]:
    write_adapters(folder / "adapters", 1)
    (folder / "shared").mkdir()
    (folder / "base.json").write_text(json.dumps(BASE_CONFIG))
    base_model = {"name": "tiny-llama", "config": str(folder / "base.json")}
    of_events = {"adapters_dir": str(folder / "shared"), "engine": {"seats": 8}, "base_model": base_model}
    listeners = {"data": FREE, "admin": FREE, "http": FREE, "endpoint_picker": FREE}
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(running(folder / "redis"))
        engine: Any = odd_engine() if kind == EVENTS else running_engine(compute="none")
        engines = [await stack.enter_async_context(engine)]
        options = {"lease_s": CALM_S, "listeners": listeners, "backend": of_events if kind == EVENTS else {}}
        pool = await stack.enter_async_context(replicas(2, redis.url, engines, folder / "adapters", **options))
        [owner] = [served for served in pool if owned(served)]
        [other] = [served for served in pool if served is not owner]
        peers, member = other.sidecar.replica.peers, owner.sidecar.replica.member.id
        between = Proxy(int(peers.addresses()[member].rpartition(":")[2]))
        await between.mend()
        stack.push_async_callback(between.cut)
        peers.are({})
        peers.are({member: f"127.0.0.1:{between.port}"})
        await until(lambda: other.sidecar.replica.board.owner_of("b0") == member)
        channel = grpc.aio.insecure_channel(other.sidecar.endpoint_picker_address)
        await stack.enter_async_context(channel)
        yield Apart(owner, PickerHouse(other, engines, channel, folder), between, kind)


def goes_on(ticket: Ticket) -> bool:
    """Return True if the rest of an answer goes past its owner."""
    return isinstance(ticket.carrier, RemoteCarrier) and ticket.carrier.goes_on


def record_of(served: Serving) -> Record:
    """Return what is known of the only request."""
    [record] = served.sidecar.gateway.chronicle._ended.values()
    return record


def line_of(caplog: pytest.LogCaptureFixture) -> str:
    """Return the only line that a request's ending has got."""
    [line] = [record.getMessage() for record in caplog.records if record.name == "sidecar.requests"]
    return line


def clients_left(served: Serving) -> list[ClientLeft]:
    return [each for each in served.recorder.events if isinstance(each, ClientLeft)]


async def usage_of(served: Serving) -> Any:
    usage = admin_pb2_grpc.AccessStub(served.admin_channel).GetUsage(admin_pb2.UsageRequest(by=["tenant"]))
    [row] = (await usage).rows
    return row


@kinds
@pytest.mark.parametrize("told_before", [False, True], ids=["told after", "told before"])
async def test_an_answer_whose_owner_is_gone_is_counted_by_who_hears_its_end(
    tmp_path: Path, kind: str, told_before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its tokens are estimated by the bytes that the log tells. Answering is no waiting."""
    async with apart(tmp_path, kind) as house:
        raw = await house.let_go()
        answering_s = 1.0
        await asyncio.sleep(answering_s)
        if told_before:
            await house.tell(raw, 20, envoy.DOWNSTREAM_PERIODIC)
        await house.between.cut()
        await until(lambda: not house.owner.state.requests, SHORT_S)
        caplog.clear()
        caplog.set_level(logging.INFO, "sidecar.requests")
        await house.tell(raw, 40)
        left = house.asked.served
        await until(lambda: not left.sidecar.gateway.tickets, SHORT_S)
        record = record_of(left)
        assert record.settle is not None
        assert (record.settle.outcome.value, record.settle.is_estimated) == ("ok", True)
        assert 36 <= record.settle.output_tokens <= 44
        assert "outcome=ok" in line_of(caplog)
        assert "lane=envoy" in line_of(caplog)
        assert "estimated=True" in line_of(caplog)
        story = timeline_of(record, record.ended_ns or 0)
        assert story.waited_ns < (record.ended_ns or 0) - record.arrived_ns - answering_s * 1e9
        usage = await usage_of(left)
        tokens = record.settle.output_tokens
        assert (dict(usage.requests), usage.output_tokens, usage.output_tokens_estimated) == ({"ok": 1}, tokens, tokens)


async def test_an_answer_whose_end_its_owner_was_told_in_vain_is_counted_too(tmp_path: Path) -> None:
    """The owner goes between the end of the answer and its own word of that."""
    async with apart(tmp_path, EVENTS) as house:
        raw = await house.let_go()
        [forward] = house.asked.served.sidecar.replica.router._forwards.values()
        taken = forward.take
        forward.take = lambda reply: False  # as if that was still under way
        await house.tell(raw, 40)
        await until(lambda: not house.owner.state.requests, SHORT_S)
        forward.take = taken
        await house.between.cut()
        await until(lambda: not house.asked.served.sidecar.gateway.tickets, SHORT_S)
        settle = record_of(house.asked.served).settle
        assert settle is not None
        assert (settle.outcome.value, settle.is_estimated) == ("ok", True)


@pytest.mark.parametrize(
    ("flag", "ending"),
    [("downstream_connection_termination", "CANCELLED"), ("upstream_remote_reset", "BACKEND_FAILED")],
)
async def test_an_answer_whose_owner_is_gone_may_end_badly(tmp_path: Path, flag: str, ending: str) -> None:
    async with apart(tmp_path, EVENTS) as house:
        raw = await house.let_go()
        await house.between.cut()
        entry = entry_of(raw.exchange(), body_bytes=10 * len(PIECE[EVENTS]))
        setattr(entry.common_properties.response_flags, flag, True)
        await house.asked.tell(entry)
        await until(lambda: not house.asked.served.sidecar.gateway.tickets, SHORT_S)
        settle = record_of(house.asked.served).settle
        assert settle is not None
        assert settle.reason is not None
        assert settle.reason.value == ending


@kinds
async def test_an_answer_whose_asked_replica_is_gone_is_not_said_to_be_cancelled(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its client gets it from the proxy, and nobody can tell the owner its end. The seat is free."""
    caplog.set_level(logging.INFO, "sidecar.requests")
    async with apart(tmp_path, kind) as house:
        await house.let_go()
        await house.between.cut()
        await until(lambda: not house.owner.state.requests, SHORT_S)
        assert "outcome=failed reason=UNOBSERVED" in line_of(caplog)
        assert "lane=envoy" in line_of(caplog)
        assert not house.owner.sidecar.gateway.tickets
        assert not clients_left(house.owner)
        [ended] = [each for each in house.owner.recorder.events if isinstance(each, RunEnded)]
        assert ended.seen is Seen.NOTHING
        assert all(not backend.running for backend in house.owner.state.backends.values())


@kinds
async def test_what_has_not_gone_past_a_replica_ends_with_it(tmp_path: Path, kind: str) -> None:
    """The request was routed, and the engine has not answered."""
    async with apart(tmp_path, kind) as house:
        await house.routed()
        await until(lambda: any(request.running for request in house.owner.state.requests.values()))
        await house.between.cut()
        await until(lambda: not house.owner.state.requests, SHORT_S)
        assert len(clients_left(house.owner)) == 1
        assert not house.owner.sidecar.gateway.tickets


async def test_an_ending_that_only_a_newer_replica_knows_ends_one_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What a gateway's log tells another replica comes in batches."""
    caplog.set_level(logging.INFO, "sidecar.requests")
    async with apart(tmp_path, EVENTS) as house:
        first, second = await house.let_go(), await house.let_go()
        await until(lambda: house.asked.picker.log.unseen == 2)
        await until(lambda: sum(request.unseen for request in house.owner.state.requests.values()) == 2)
        of_first, of_second = (raw.exchange()["exchange"] for raw in (first, second))
        sightings = [
            peers_pb2.Sighting(exchange=of_first, body_bytes=500, ending="never heard of"),
            peers_pb2.Sighting(exchange=of_second, body_bytes=500, ending="whole"),
        ]
        asked_replica = house.asked.served.sidecar.replica.member.id
        await house.owner.sidecar.replica.peers.stub(asked_replica).Tell(peers_pb2.TellRequest(sightings=sightings))
        await until(lambda: not house.owner.state.requests, SHORT_S)
        lines = [record.getMessage() for record in caplog.records if record.name == "sidecar.requests"]
        assert sorted(line.split("outcome=")[1].split()[0] for line in lines) == ["failed", "ok"]
