"""Several replicas in front of one pool: whoever is asked, the owner of the backend answers."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from sidecar.core.effects import Dispatch
from sidecar.core.events import Received
from sidecar.fronts.http.probes import why_not_ready
from sidecar.proto import admin_pb2, admin_pb2_grpc
from tests.kit.emulated import running_engine
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, LEASE_S, owned, replica, replicas, settled
from tests.kit.serving import PATIENCE_S, Serving, until, write_adapters
from tests.kit.vllm_emulated import running_vllm

DUMMY = {"compute": "none", "shape": "tiny"}


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    write_adapters(tmp_path / "adapters", 8)
    return tmp_path / "adapters"


async def test_any_replica_answers_for_any_adapter(adapters: Path, tmp_path: Path) -> None:
    """Each request is dispatched once, by the owner of its backend."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY) as one,
        running_engine(**DUMMY) as two,
        replicas(3, redis.url, [one, two], adapters, lease_s=CALM_S) as pool,
    ):
        assert set().union(*map(owned, pool)) == {"b0", "b1"}
        names = sorted(pool[0].state.names)
        ids = [f"{name}|{number}" for name in names for number in range(len(pool))]
        answers = await asyncio.gather(*(pool[int(each[-1])].ask(each[:-2], request_id=each) for each in ids))
        asked = [name for name in names for _ in pool]
        assert [answer.origins[0].request_id for answer in answers] == ids
        assert [answer.tokens for answer in answers] == [pool[0].expected(name, 4) for name in asked]
        for served in pool:
            sent = served.recorder.of(Dispatch)
            assert {one.backend for one in sent} <= owned(served)
            assert {one.epoch for one in sent} <= {served.state.backends[b].epoch for b in owned(served)}
        dispatched = sum(served.recorder.count(Dispatch) for served in pool)
        assert dispatched == len(answers)
        assert sum(served.sidecar.replica.router.forwards for served in pool) > 0
        events = [event for served in pool for event in served.recorder.events]
        assert {event.client_id for event in events if isinstance(event, Received)} == {*ids}


async def test_an_owner_that_is_gone_is_followed_by_another(adapters: Path, tmp_path: Path) -> None:
    """What it had not answered a token of is answered all the same."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY) as one,
        running_engine(**DUMMY) as two,
        replica(0, redis.url, [one, two], adapters) as left,
    ):
        async with replica(1, redis.url, [one, two], adapters) as gone:
            await until(lambda: settled([left, gone]))
        answers = await asyncio.gather(*(left.ask(f"a{number:02}") for number in range(8)))
        assert [answer.tokens for answer in answers] == [left.expected(f"a{n:02}", 4) for n in range(8)]
        assert owned(left) == {"b0", "b1"}


async def test_a_replica_that_drains_hands_over_what_it_owns(adapters: Path, tmp_path: Path) -> None:
    """Without waiting for a lease to end, and without an answer that fails."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY, time_scale=0.2) as one,
        replicas(2, redis.url, [one], adapters, lease_s=CALM_S) as pool,
    ):
        (owner,) = [served for served in pool if owned(served)]
        (other,) = [served for served in pool if served is not owner]
        load = [asyncio.create_task(other.ask(f"a{number % 8:02}", tokens=16)) for number in range(64)]
        await until(lambda: owner.recorder.count(Dispatch) > 4)
        await owner.sidecar.drain()
        answers = await asyncio.gather(*load)
        assert [len(answer.tokens) for answer in answers] == [16] * 64
        await until(lambda: owned(other) == {"b0"})


async def test_a_client_that_leaves_is_cancelled_at_the_owner(adapters: Path, tmp_path: Path) -> None:
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY, time_scale=1.0) as one,
        replicas(2, redis.url, [one], adapters, lease_s=CALM_S) as pool,
    ):
        (owner,) = [served for served in pool if owned(served)]
        (other,) = [served for served in pool if served is not owner]
        asked = asyncio.create_task(other.ask("a00", tokens=500))
        await until(lambda: owner.recorder.count(Dispatch) == 1)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await until(lambda: not owner.state.requests)


async def test_a_request_is_open_where_it_came_and_where_it_is_answered(adapters: Path, tmp_path: Path) -> None:
    """A replica that only passes a request on carries its stream all the same, and its metrics say so."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY, time_scale=1.0) as one,
        replicas(2, redis.url, [one], adapters, lease_s=CALM_S) as pool,
    ):
        (owner,) = [served for served in pool if owned(served)]
        (other,) = [served for served in pool if served is not owner]
        asked = [asyncio.create_task(served.ask("a00", tokens=3000)) for served in (other, other, owner)]
        await until(lambda: owner.recorder.count(Dispatch) == 3)
        assert [await open_calls(other), await open_calls(owner)] == [2, 3]
        replica, pool_of = owner.sidecar.replica, admin_pb2_grpc.PoolStub
        assert replica is not None
        watched: Any = pool_of(other.admin_channel)  # type: ignore[no-untyped-call]
        views = [
            await other.queues.Get(admin_pb2.QueueRequest()),
            await other.queues.Get(admin_pb2.QueueRequest(backend="b0")),
            await anext(aiter(watched.Watch(admin_pb2.WatchPoolRequest()))),
        ]
        there = f"2 of this replica's requests are at {replica.member.id}, which owns b0: ask it"
        assert [view.verdict for view in views] == [f"{there}; nobody waits here, nothing runs"] * 3
        assert (await owner.queues.Get(admin_pb2.QueueRequest())).verdict.endswith("nobody waits, 3 running")
        for each in asked:
            each.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await until(lambda: not owner.sidecar.gateway.tickets and not other.sidecar.gateway.tickets)
        assert [await open_calls(other), await open_calls(owner)] == [0, 0]


async def open_calls(served: Serving) -> float:
    """Return what a replica's metrics say."""
    _, text = await served.sidecar.metrics.render()
    found = {family.name: family for family in text_string_to_metric_families(text.decode())}
    return float(found["lora_sidecar_open_calls"].samples[0].value)


async def test_what_an_owner_refuses_is_refused_in_its_words(adapters: Path, tmp_path: Path) -> None:
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY) as one,
        replicas(2, redis.url, [one], adapters, lease_s=CALM_S) as pool,
    ):
        (other,) = [served for served in pool if not owned(served)]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await other.ask("nobody")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await other.ask("a00", prompt=1000)
        assert refused.value.code() is grpc.StatusCode.INTERNAL
        assert "[TensorRT-LLM][ERROR]" in (refused.value.details() or "")


async def test_who_owns_what_is_told(adapters: Path, tmp_path: Path) -> None:
    """Each replica tells the same, but for who was asked."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY) as one,
        running_engine(**DUMMY) as two,
        replicas(2, redis.url, [one, two], adapters, lease_s=CALM_S) as pool,
    ):
        await until(lambda: all(served.sidecar.replica.board.leader for served in pool))
        for served in pool:
            listed = await served.replicas.List(admin_pb2.ListReplicasRequest())
            assert [(each.name, each.self) for each in listed.replicas] == [
                (f"r{number}", other is served) for number, other in enumerate(pool)
            ]
            assert [each.leads for each in listed.replicas].count(True) == 1
            owns = {each.id: [owned.backend for owned in each.owns] for each in listed.replicas}
            assert owns == {other.sidecar.replica.member.id: sorted(owned(other)) for other in pool}
            backends = (await served.backends.List(admin_pb2.ListBackendsRequest())).backends
            assert {each.id: each.owner for each in backends} == {
                backend: member for member, held in owns.items() for backend in held
            }
            assert all(each.epoch > 0 for each in backends)


async def test_a_replica_that_owns_nothing_is_ready_when_others_serve(adapters: Path, tmp_path: Path) -> None:
    """It is, once it knows of one; and not when none does any more."""
    async with running(tmp_path / "redis") as redis, running_engine(**DUMMY) as one:
        async with replicas(2, redis.url, [one], adapters) as pool:
            (other,) = [served for served in pool if not owned(served)]
            assert why_not_ready(other.sidecar.gateway) == ""
        async with replica(3, redis.url, [one], adapters) as late:
            why = why_not_ready(late.sidecar.gateway)
            assert ("b0 is served by no replica yet" in why) != bool(owned(late))  # a lease may end before one looks
            await until(lambda: why_not_ready(late.sidecar.gateway) == "")


async def test_before_a_vllm_its_owner_loads_and_the_next_finds_it_loaded(adapters: Path, tmp_path: Path) -> None:
    """Replicas share the folder; what one staged the other stages under the same name."""
    shared = {"adapters_dir": str(tmp_path / "shared"), "engine": {"device_pages": 2, "host_pages": 4, "seats": 8}}
    async with (
        running(tmp_path / "redis") as redis,
        running_vllm(compute="none", max_loras=2, max_cpu_loras=4, max_lora_rank=16) as (engine, _),
        replica(0, redis.url, [engine], adapters, backend=shared) as left,
    ):
        async with replica(1, redis.url, [engine], adapters, backend=shared) as gone:
            await until(lambda: settled([left, gone]))
            names = sorted(left.state.names)
            before = await asyncio.gather(*(served.ask(name) for name in names for served in (left, gone)))
        after = await asyncio.gather(*(left.ask(name) for name in names))
        assert [answer.tokens for answer in after] == [answer.tokens for answer in before[::2]]
        assert [answer.tokens for answer in after] == [answer.tokens for answer in before[1::2]]
        assert len({tuple(answer.tokens) for answer in after}) == len(names)


async def test_a_replica_starts_though_another_one_reads_nothing(adapters: Path, tmp_path: Path) -> None:
    """A live member that stands still: what is to be served is registered when that one is no member any more."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY) as one,
        Redis.from_url(redis.url, decode_responses=True) as client,
    ):
        async with replica(0, redis.url, [one], adapters):
            (key,) = [key async for key in client.scan_iter("*beats*")]
        await client.zadd(key, {"frozen": 1e18})  # in the far future: it never stops to count as live
        async with replica(1, redis.url, [one], adapters) as started:
            assert len(started.sidecar.served.left) == 8
            await client.zrem(key, "frozen")
            await until(lambda: not started.sidecar.served.left)
            assert set(started.state.names) == {f"a{number:02}" for number in range(8)}


async def test_a_beat_that_breaks_is_one_that_failed(adapters: Path, tmp_path: Path) -> None:
    """Whatever went wrong: a member that waits for its answer for ever would be none any more."""
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY) as one,
        replica(0, redis.url, [one], adapters) as served,
    ):
        leases = served.sidecar.replica.keeper._leases
        beat, broken = leases.beat, []

        async def breaks(effect: Any) -> Any:
            if len(broken) == 3:
                return await beat(effect)
            broken.append(effect)
            raise RuntimeError("the handler is closed")

        leases.beat = breaks
        await until(lambda: len(broken) == 3)
        await until(lambda: served.sidecar.replica.keeper._ownership.know.reaches_redis and owned(served) == {"b0"})
        assert (await served.ask("a00")).tokens == served.expected("a00", 4)


async def test_a_stopped_replica_asks_redis_nothing_more(adapters: Path, tmp_path: Path) -> None:
    """Also if the answer to a beat comes in spite of its cancellation, as the client's timeouts can have it."""
    answered: list[Any] = []
    async with running(tmp_path / "redis") as redis, running_engine(**DUMMY) as one:
        async with replica(0, redis.url, [one], adapters) as served:
            leases = served.sidecar.replica.keeper._leases
            beat = leases.beat

            async def late(effect: Any) -> Any:
                answered.append(await beat(effect))
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(PATIENCE_S)
                return answered[-1]

            leases.beat = late
            await until(lambda: bool(answered))
        await asyncio.sleep(LEASE_S)  # three beats fit
        assert len(answered) == 1
