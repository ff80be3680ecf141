"""Replicas that come and go while requests are on their way between them: nothing is lost, nothing is repeated."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sidecar.core.effects import Dispatch
from sidecar.journal.raised import Raised
from sidecar.lab.engine.tokens import BOS
from sidecar.proto import admin_pb2, admin_pb2_grpc, gateway_pb2, peers_pb2, peers_pb2_grpc
from sidecar.replicas import router
from sidecar.replicas.call import ForwardCall
from sidecar.telling.asking import asked_for
from sidecar.telling.record import GivenBack
from tests.kit import replica_pool
from tests.kit.emulated import EngineProcess, running_engine
from tests.kit.redis_servers import Proxy, running
from tests.kit.replica_pool import CALM_S, owned, replicas, the_leader
from tests.kit.serving import PATIENCE_S, Answer, Serving, until, write_adapters

DUMMY = {"compute": "none", "shape": "tiny"}
SLOW = DUMMY | {"time_scale": 1.0, "seats": 1}


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    write_adapters(tmp_path / "adapters", 8)
    return tmp_path / "adapters"


@asynccontextmanager
async def owner_and_other(
    adapters: Path, tmp_path: Path, engine: Mapping[str, Any]
) -> AsyncIterator[tuple[Serving, Serving]]:
    """Run two calm replicas of one engine: the one that owns it, and the other."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**engine) as one,
        replicas(2, redis.url, [one], adapters, lease_s=CALM_S) as pool,
    ):
        (owner,) = [served for served in pool if owned(served)]
        (other,) = [served for served in pool if served is not owner]
        yield owner, other


async def test_what_a_former_member_has_begun_goes_on_and_the_rest_is_sent_again(
    adapters: Path, tmp_path: Path
) -> None:
    """Its beats may have failed to reach Redis for a while: an answer that comes is an answer."""
    async with owner_and_other(adapters, tmp_path, SLOW | {"time_scale": 20.0}) as (owner, other):
        pool = [owner, other]
        begun = asyncio.create_task(other.ask("a00", tokens=30))
        await until(lambda: any(request.first_token for request in owner.state.requests.values()))
        waits = asyncio.create_task(other.ask("a01", tokens=4, request_id="waits"))
        await until(lambda: len(owner.state.requests) == 2)
        other.sidecar.replica.peers.are({})  # as the next beat would tell; the one after that has it back
        assert (await begun).tokens == other.expected("a00", 30)
        assert (await waits).tokens == other.expected("a01", 4)
        assert other.sidecar.replica.router.reroutes > 0
        record = told_of(other, "waits")
        given_back_ns = next(entry.at_ns for entry in record.happened if isinstance(entry.what, GivenBack))
        queue_ns = (await waits).origins[0].queue_ms * 1e6
        assert queue_ns >= given_back_ns - record.arrived_ns  # the owner counts the wait before as well
        assert record.settle.queue_ns == told_of(owner, "waits").settle.queue_ns == round(queue_ns)
        assert await counted_endings(pool) == Counter(ok=2)


async def test_an_owner_that_crashes_counts_no_request_that_goes_on(adapters: Path, tmp_path: Path) -> None:
    """Only what ends with it."""
    async with owner_and_other(adapters, tmp_path, SLOW) as (owner, other):
        pool = [owner, other]
        begun = asyncio.create_task(other.ask("a00", tokens=500))
        await until(lambda: any(ticket.came for ticket in other.sidecar.gateway.tickets.values()))
        waits = asyncio.create_task(other.ask("a01"))
        await until(lambda: len(owner.state.requests) == 2)
        gateway = owner.sidecar.gateway
        gateway.crash.raised = Raised(RuntimeError("a fault"), 0)
        gateway.end_open(gateway.crash.raised)
        with pytest.raises(grpc.aio.AioRpcError, match="in the middle of the answer"):
            await begun
        await until(lambda: other.sidecar.replica.router.reroutes > 0)
        assert await counted_endings(pool) == Counter(failed=1)
        waits.cancel()


def told_of(served: Serving, client_id: str) -> Any:
    """Return the last record of a request."""
    return served.sidecar.gateway.chronicle.find(asked_for(f"id={client_id}"))[-1]


async def test_who_is_left_counts_what_ended_with_an_owner(
    adapters: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The owner cannot: once by each counter and in the log, with the tokens that the client got."""
    caplog.set_level(logging.WARNING, "sidecar.requests")
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**SLOW) as one,
        replicas(2, redis.url, [one], adapters, lease_s=CALM_S) as pool,
        asyncio.timeout(2 * PATIENCE_S),
    ):
        (owner,) = [served for served in pool if owned(served)]
        (other,) = [served for served in pool if served is not owner]
        peers, board = other.sidecar.replica.peers, other.sidecar.replica.board
        member = owner.sidecar.replica.member.id
        proxy = Proxy(int(peers.addresses()[member].rpartition(":")[2]))
        await proxy.mend()
        peers.are({})
        peers.are({member: f"127.0.0.1:{proxy.port}"})
        await until(lambda: board.owner_of("b0") == member)
        tokens = gateway_pb2.TokenIds(ids=[BOS, 1, 2])
        request = gateway_pb2.GenerateRequest(
            adapter="a00@v1", tokens=tokens, max_tokens=500, request_id="cut", tenant="acme"
        )
        got: list[int] = []

        async def read() -> None:
            async for part in other.gateway.Generate(request):
                got.extend(part.token_ids)

        reading = asyncio.create_task(read())
        await until(lambda: bool(got))
        await proxy.cut()
        with pytest.raises(grpc.aio.AioRpcError, match="lost in the middle"):
            await reading
        assert await counted_endings([other]) == Counter(failed=1)
        samples = await samples_of(other)
        for name, value in (("adapter", "a00"), ("class", "default"), ("tenant", "acme")):
            assert samples[f"lora_sidecar_{name}_requests_total", *sorted((value, "failed"))] == 1
        (line,) = [record.getMessage() for record in caplog.records if record.name == "sidecar.requests"]
        assert "id=cut" in line
        assert f"output_tokens={len(got)}" in line
        usage = admin_pb2_grpc.AccessStub(other.admin_channel).GetUsage(admin_pb2.UsageRequest(by=["tenant"]))
        (row,) = (await usage).rows
        assert (row.tenant, dict(row.requests), row.output_tokens) == ("acme", {"failed": 1}, len(got))
        assert not told_of(other, "cut").is_elsewhere


async def test_a_replica_that_stops_counts_what_it_cuts_off(adapters: Path, tmp_path: Path) -> None:
    """Not the owner, too; and what the client has left is the owner's to count."""
    async with owner_and_other(adapters, tmp_path, SLOW | {"seats": 2}) as (owner, other):
        left, cut = (asyncio.create_task(other.ask(name, tokens=5_000)) for name in ("a00", "a01"))
        await until(lambda: sum(request.first_token for request in owner.state.requests.values()) == 2)
        await until(lambda: all(ticket.came for ticket in other.sidecar.gateway.tickets.values()))
        left.cancel()
        await until(lambda: len(owner.state.requests) == 1)
        await other.sidecar.gateway.cut_off()
        with pytest.raises(grpc.aio.AioRpcError, match="the sidecar is shutting down"):
            await cut
        await until(lambda: not owner.state.requests)
        assert await counted_endings([owner]) == Counter(cancelled=1)
        assert await counted_endings([other]) == Counter(failed=1)


async def test_an_owner_that_stops_leaves_what_waits_to_the_next_one(adapters: Path, tmp_path: Path) -> None:
    """It counts no ending of a request that is answered after all."""
    async with owner_and_other(adapters, tmp_path, SLOW) as (owner, other):
        pool = [owner, other]
        begun = asyncio.create_task(owner.ask("a00", tokens=500))
        await until(lambda: any(request.first_token for request in owner.state.requests.values()))
        waits = asyncio.create_task(other.ask("a01"))
        await until(lambda: len(owner.state.requests) == 2)
        await owner.sidecar.gateway.cut_off()
        with pytest.raises(grpc.aio.AioRpcError, match="the sidecar is shutting down"):
            await begun
        assert (await waits).tokens == other.expected("a01", 4)
        assert await counted_endings(pool) == Counter(failed=1, ok=1)


async def test_a_replica_that_drains_takes_no_request_for_another_either(adapters: Path, tmp_path: Path) -> None:
    """Else it would never end under load; what it has passed on before it answers."""
    async with owner_and_other(adapters, tmp_path, SLOW) as (owner, other):
        begun = asyncio.create_task(other.ask("a00", tokens=100))
        await until(lambda: owner.recorder.count(Dispatch) == 1)
        drained = asyncio.create_task(other.sidecar.drain())
        await until(lambda: other.state.draining)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await other.ask("a01")
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in (refused.value.details() or "")
        assert (await begun).tokens == other.expected("a00", 100)
        await drained


async def test_what_waits_for_an_engine_that_is_gone_goes_to_another(adapters: Path, tmp_path: Path) -> None:
    """Whoever was asked, and whoever owned it; an answer that had begun ends with its engine."""
    options = ("--compute", "none", "--shape", "tiny", "--seats", "2")
    async with (
        running(tmp_path / "redis") as redis,
        EngineProcess(*options, time_scale=1.0) as one,
        EngineProcess(*options, time_scale=1.0) as two,
        replicas(2, redis.url, [one, two], adapters, lease_s=CALM_S) as pool,
        asyncio.timeout(PATIENCE_S),
    ):
        names = [f"a{number:02}" for number in range(8)]
        asks = [asyncio.create_task(served.ask(name, tokens=40)) for served in pool for name in names * 2]
        await until(lambda: {one.backend for served in pool for one in served.recorder.of(Dispatch)} == {"b0", "b1"})
        await one.kill()
        answers = await asyncio.gather(*asks, return_exceptions=True)
        for name, answer in zip(names * 4, answers, strict=True):
            if isinstance(answer, Answer):
                assert answer.tokens == pool[0].expected(name, 40)
            else:
                assert "after the first token" in str(answer) or "tokens had been sent" in str(answer)
        full = sum(isinstance(answer, Answer) for answer in answers)
        assert full >= 24
        assert await counted_endings(pool) == +Counter(ok=full, failed=len(answers) - full)


async def counted_endings(pool: list[Serving]) -> Counter[str]:
    """Return how many requests ended how, as all replicas count: each once, however often it was passed on."""
    counted: Counter[str] = Counter()
    for served in pool:
        for (name, *labels), value in (await samples_of(served)).items():
            if name == "lora_sidecar_requests_total":
                counted[labels[0]] += int(value)
    return +counted


async def samples_of(served: Serving) -> dict[tuple[str, ...], float]:
    """Return a replica's metrics, by name and the values of their labels, sorted."""
    _, text = await served.sidecar.metrics.render()
    families = text_string_to_metric_families(text.decode())
    return {(each.name, *sorted(each.labels.values())): each.value for family in families for each in family.samples}


async def test_a_plan_that_cannot_be_made_keeps_nobody_from_being_told(adapters: Path, tmp_path: Path) -> None:
    """A policy's fault must not let boards grow old, by which the others route."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY) as one,
        replicas(2, redis.url, [one], adapters, lease_s=CALM_S) as pool,
        asyncio.timeout(PATIENCE_S),
    ):
        leader = await the_leader(pool)
        (other,) = [served for served in pool if served is not leader]
        told = 0

        def heard(board: Any, now_s: float) -> None:
            nonlocal told
            told += board.member == leader.sidecar.replica.member.id
            hear(board, now_s)

        def broken() -> None:
            raise RuntimeError("no plan today")

        hear = other.sidecar.replica.board.heard
        other.sidecar.replica.board.heard = heard  # type: ignore[method-assign]
        leader.sidecar.replica._make_plan = broken  # type: ignore[method-assign]
        await until(lambda: told >= 3)


async def test_a_replica_is_heard_again_after_its_listener_was_away(adapters: Path, tmp_path: Path) -> None:
    """However long that took: the others look for it twice a second, and as soon as it is there."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY) as one,
        replicas(2, redis.url, [one], adapters, lease_s=CALM_S) as pool,
        asyncio.timeout(2 * PATIENCE_S),
    ):
        (owner,) = [served for served in pool if owned(served)]
        (other,) = [served for served in pool if served is not owner]
        peers, board = other.sidecar.replica.peers, other.sidecar.replica.board
        member = owner.sidecar.replica.member.id
        address = peers.addresses()[member]
        proxy = Proxy(int(address.rpartition(":")[2]))
        await proxy.mend()
        peers.are({})
        peers.are({member: f"127.0.0.1:{proxy.port}"})
        await until(lambda: board.owner_of("b0") == member)
        await proxy.cut()
        await until(lambda: board.owner_of("b0") is None)
        await proxy.mend()
        await until(lambda: board.owner_of("b0") == member)
        assert (await other.ask("a00")).tokens == other.expected("a00", 4)
        await proxy.cut()


async def test_a_pool_that_leaves_as_a_whole_waits_for_nobody(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has begun is answered; the rest is refused, for there is no owner any more."""
    monkeypatch.setattr(router, "LEAVING_S", 0.2)
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**SLOW) as one,
        replicas(2, redis.url, [one], adapters, lease_s=CALM_S) as pool,
        asyncio.timeout(PATIENCE_S),
    ):
        (owner,) = [served for served in pool if owned(served)]
        asks = [asyncio.create_task(served.ask(f"a{number:02}", tokens=40)) for served in pool for number in range(8)]
        await until(lambda: any(request.first_token for request in owner.state.requests.values()))
        await asyncio.gather(*(served.sidecar.drain() for served in pool))
        answers = await asyncio.gather(*asks, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert 0 < len(refused) < len(answers)
        assert {each.code() for each in refused} == {grpc.StatusCode.UNAVAILABLE}
        assert all(len(answer.tokens) == 40 for answer in answers if isinstance(answer, Answer))
        assert await counted_endings(pool) == Counter(ok=len(answers) - len(refused), refused=len(refused))


NESTED = b"\x83\xa1!\xa7Unowned\xa7backend\xa1b\xa4last" * 5000 + msgspec.msgpack.encode({"!": "Moved"})
ODD_ENDINGS: dict[str, tuple[dict[str, Any], dict[str, int], str]] = {
    "an unknown reason": ({"reason": "NEVER_HEARD_OF"}, {}, "NEVER_HEARD_OF"),
    "no status of gRPC": ({"reason": "BACKEND_REJECTED"}, {"grpc_code": 99}, "99"),
    "a cause without end": ({"reason": "NOT_OWNER", "cause": msgspec.Raw(NESTED)}, {}, "recursion"),
}


@pytest.mark.parametrize("odd", ODD_ENDINGS)
async def test_an_ending_that_is_not_understood_is_an_ending_all_the_same(
    odd: str, adapters: Path, tmp_path: Path
) -> None:
    """A newer replica may have reasons that this one has never heard of."""
    told, more, words = ODD_ENDINGS[odd]

    class Newer(peers_pb2_grpc.PeersServicer):
        async def Forward(self, messages: Any, context: Any) -> AsyncIterator[Any]:
            async for message in messages:
                for request in message.requests:
                    settle = {"request": 1, "outcome": "failed", "name": "", "tenant": "", "klass": "", "queue_ns": 0}
                    written = msgspec.msgpack.encode(settle | {"input_tokens": 0} | told)
                    ending = peers_pb2.ForwardedEnding(settle=written, **more)
                    reply = peers_pb2.ForwardReply(number=request.number, ending=ending)
                    yield peers_pb2.ForwardReplies(replies=[reply])

    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**SLOW) as one,
        replicas(2, redis.url, [one], adapters, lease_s=CALM_S) as pool,
        asyncio.timeout(PATIENCE_S),
    ):
        (other,) = [served for served in pool if not owned(served)]
        server = grpc.aio.server()
        peers_pb2_grpc.add_PeersServicer_to_server(Newer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        line = ForwardCall(peers_pb2_grpc.PeersStub(channel))
        other.sidecar.replica.router._forward_call = lambda member, size_bytes: line
        for _ in range(2):  # the line lives on
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await other.ask("a00")
            assert words in (failed.value.details() or "")
        await channel.close()
        await server.stop(None)


async def test_owners_go_on_when_redis_hangs(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connections stay open and nothing comes: that is found out before a lease ends."""
    lease_s = 2.0
    monkeypatch.setattr(replica_pool, "LEASE_S", lease_s)
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY) as one,
        running_engine(**DUMMY) as two,
        replicas(2, redis.url, [one, two], adapters) as pool,
        asyncio.timeout(PATIENCE_S),
    ):
        owns = [owned(served) for served in pool]
        redis.signal(signal.SIGSTOP)
        until_s = monotonic() + 2 * lease_s
        while monotonic() < until_s:
            for served in pool:
                assert (await served.ask("a00")).tokens == served.expected("a00", 4)
            await asyncio.sleep(0.01)
        assert [owned(served) for served in pool] == owns
