"""What a registry in Redis does when Redis loses data, goes away or fails over."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from sidecar.errors import Reason, Refused
from sidecar.ownership.effects import SendAcquire, SendBeat
from sidecar.ownership.facts import Bounds, Member
from sidecar.state.records import refreshed
from sidecar.state.redis.members import RedisMembers
from sidecar.state.redis.registry import RedisRegistry
from sidecar.state.registry import Change
from sidecar.tasks import ended
from tests.kit.redis_servers import Server, cluster, cuttable, running, watched
from tests.kit.registries import link_to, record, shared_registry
from tests.kit.serving import until

META, ADAPTERS, CHANGES = ("{lora-sidecar}:" + name for name in ("meta", "adapters", "changes"))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with running(tmp_path / "server") as server:
        yield server


@asynccontextmanager
async def replicas(count: int, url: str) -> AsyncIterator[list[RedisRegistry]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(shared_registry(url)) for _ in range(count)]


def heard_by(registry: RedisRegistry) -> list[Change]:
    heard: list[Change] = []
    registry.subscribe(heard.append)
    return heard


def beat_of(name: str) -> SendBeat:
    return SendBeat(1, Member(name, name))


async def beat_for_ever(members: RedisMembers, member: str, beats: list[int]) -> None:
    """Beat for a member that says it has read nothing, until told otherwise by a number in `beats`."""
    while True:
        await members.beat(beat_of(member), "", beats[-1])
        await asyncio.sleep(0.05)


async def is_written(registry: RedisRegistry, name: str, seed: int = 1) -> None:
    """Register a name as soon as Redis takes it."""
    async with asyncio.timeout(30):
        while True:
            try:
                await registry.put(record(name, seed), registry.get(name))
                return
            except Refused as refused:
                if refused.reason not in (Reason.STATE_UNAVAILABLE, Reason.CHANGED_MEANWHILE):
                    raise
            await asyncio.sleep(0.02)


async def test_a_redis_that_comes_back_empty_is_filled_again(server: Server) -> None:
    """Every replica puts back what it has; what was forgotten stays forgotten and numbers go on."""
    async with replicas(2, server.url) as (one, two):
        for name in ("a", "b", "c"):
            await one.put(record(name), None)
        await one.delete("b", record("b"))
        await until(lambda: two.last_change == 4)
        heard = heard_by(two)
        incarnation = one.incarnation
        await server.kill()
        await until(lambda: one.away_since is not None and two.away_since is not None)
        assert one.get("a") == record("a")
        with pytest.raises(Refused, match=r"needs Redis at .*, which is away since .*; try again") as caught:
            await one.put(record("d"), None)
        assert caught.value.reason is Reason.STATE_UNAVAILABLE
        await server.start()
        await is_written(two, "d")
        await until(lambda: one.get("d") is not None)
        assert [found.name for found in one.all()] == ["a", "c", "d"] == [found.name for found in two.all()]
        await until(lambda: one.incarnation == two.incarnation != incarnation)
        assert [change.name for change in heard] == ["d"]
        assert heard[0].number > 4
        async with shared_registry(server.url) as late:
            assert late.all() == one.all()


async def test_an_old_dump_brings_no_old_version_back(server: Server) -> None:
    """A Redis from yesterday's dump takes what replicas know to be newer, and gives what only it has to nobody."""
    async with replicas(2, server.url) as (one, two):
        await one.put(record("kept"), None)
        await one.put(record("gone"), None)
        async with server.client() as client:
            await client.save()
        newer = refreshed(record("kept"), 1)
        await one.put(newer, record("kept"))
        await one.delete("gone", record("gone"))
        await until(lambda: two.last_change == 4)
        await server.kill()
        await server.start()
        await is_written(one, "new")
        await until(lambda: two.get("new") is not None)
        for registry in (one, two):
            assert registry.get("kept") == newer
            assert registry.get("gone") is None
        async with shared_registry(server.url) as late:
            assert late.all() == one.all()


async def test_the_newer_of_two_copies_wins_whoever_comes_first(server: Server) -> None:
    """Of an emptied Redis the replica that had read less comes first; the other's newer content stands in the end."""
    async with cuttable(server) as proxy, shared_registry(proxy.url) as behind, shared_registry(server.url) as ahead:
        await ahead.put(record("a"), None)
        await until(lambda: behind.last_change == 1)
        await proxy.cut()
        newer = refreshed(record("a"), 1)
        await ahead.put(newer, record("a"))
        await ahead.put(record("b"), None)
        await ahead.delete("b", record("b"))
        await server.kill()
        await proxy.mend()
        await server.start()
        await until(lambda: behind.away_since is None and ahead.away_since is None)
        await until(lambda: behind.get("a") == newer == ahead.get("a"))
        assert behind.get("b") is None
        await is_written(behind, "b", 2)
        await until(lambda: ahead.get("b") == record("b", 2))


@pytest.mark.parametrize("key", [ADAPTERS, CHANGES, META])
async def test_a_single_key_that_is_lost_is_noticed(server: Server, key: str) -> None:
    """Somebody deletes one of the keys, or Redis evicts it: replicas mend it, with nothing lost and nothing stuck."""
    async with replicas(2, server.url) as (one, two):
        for name in ("a", "b"):
            await one.put(record(name), None)
        await until(lambda: two.last_change == 2)
        async with server.client() as client:
            await client.delete(key)
        await is_written(one, "c")
        await until(lambda: two.get("c") is not None)
        assert [found.name for found in two.all()] == ["a", "b", "c"]
        async with shared_registry(server.url) as late:
            assert late.all() == one.all()


async def test_failover_with_lost_writes(tmp_path: Path) -> None:
    """The new master never got the last writes; the replicas that had read them put them back."""
    async with watched(tmp_path) as sentinels, replicas(2, sentinels.url) as (one, two):
        await one.put(record("a"), None)
        async with sentinels.replica.client() as replica:
            async with asyncio.timeout(30):
                while await replica.xlen(CHANGES) != 1:
                    await asyncio.sleep(0.01)
            await replica.replicaof("127.0.0.1", 1)  # from here on it gets nothing more
            await one.put(record("b"), None)
            await one.put(refreshed(record("a"), 1), record("a"))
            await until(lambda: two.last_change == 3)
            assert await replica.xlen(CHANGES) == 1
        await sentinels.master.kill()
        await is_written(two, "c")
        await until(lambda: one.get("c") is not None)
        # What the new master takes is newer than all that the old one may have taken. While a reader puts back what was
        # lost, its records are ahead of its position.
        await until(lambda: one.last_change > 100_000)
        for registry in (one, two):
            assert registry.get("b") == record("b")
            assert registry.get("a") == refreshed(record("a"), 1)
        async with shared_registry(sentinels.url) as late:
            assert late.all() == one.all()


async def test_a_cluster(tmp_path: Path) -> None:
    """All keys are in one slot, wherever that is: writes, changes, resuming, beats and leases work."""
    async with cluster(tmp_path) as servers:
        url = "redis+cluster://" + ",".join(server.address for server in servers)
        async with replicas(2, url) as (one, two):
            for name in ("a", "b"):
                await one.put(record(name), None)
            await until(lambda: two.last_change == 2)
            await two.delete("a", record("a"))
            assert [found.name for found in one.all()] == ["b"]
            assert [change.name for change in await one.changes_after(1)] == ["b", "a"]
            link = link_to(url)
            members = RedisMembers(link)
            beat = await members.beat(beat_of("one"), "", 3)
            assert (beat.revision, beat.incarnation) == (3, one.incarnation)
            assert [standing.applied for standing in beat.standings] == [3]
            here, until_ns = beat.answered.generation, beat.answered.redis_ns + 10**12
            call = SendAcquire(2, "gpu", "t1", 0, (), (), True, here, until_ns)
            assert (await members.acquire(call, Member("one", "one"))).granted
            await link.close()


async def test_a_connection_that_is_cut_and_mended(server: Server) -> None:
    """Meanwhile reads go on, writes are refused, and what others changed is read afterwards, once each."""
    async with cuttable(server) as proxy, shared_registry(proxy.url) as one, shared_registry(server.url) as two:
        await one.put(record("a"), None)
        heard = heard_by(one)
        await proxy.cut()
        await until(lambda: one.away_since is not None)
        for name in ("b", "c"):
            await two.put(record(name), None)
        await two.delete("a", two.get("a") or record("a"))
        assert one.get("a") == record("a")
        with pytest.raises(Refused) as caught:
            await one.put(record("d"), None)
        assert caught.value.reason is Reason.STATE_UNAVAILABLE
        await proxy.mend()
        await until(lambda: one.last_change == 4)
        assert (one.lag, one.away_since) == (0, None)
        assert [(change.number, change.name) for change in heard] == [(2, "b"), (3, "c"), (4, "a")]


async def test_a_replica_that_was_away_for_too_many_changes_reads_all_anew(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it missed is told all the same; a name whose forgetting is forgotten too is dropped, not put back."""
    monkeypatch.setattr("sidecar.state.redis.registry.LIMITS", (5, 7 * 24 * 3600 * 1000, 2))
    async with cuttable(server) as proxy, shared_registry(proxy.url) as one, shared_registry(server.url) as two:
        await two.put(record("old"), None)
        await until(lambda: one.last_change == 1)
        heard = heard_by(one)
        await proxy.cut()
        await until(lambda: one.away_since is not None)
        await two.delete("old", record("old"))
        for number in range(10):
            await two.put(record(f"a{number}"), None)
        for number in range(3):
            await two.delete(f"a{number}", record(f"a{number}"))
        await proxy.mend()
        await until(lambda: one.last_change == two.last_change)
        assert one.all() == two.all()
        assert {(change.name, change.record is None) for change in heard} >= {("old", True), ("a9", False)}
        async with server.client() as client:
            assert not await client.hexists(ADAPTERS, "old")
        await one.put(record("more"), None)
        await until(lambda: two.get("more") is not None)


async def test_a_server_that_stands_still(server: Server) -> None:
    """A write whose answer does not come is refused in a while; what was taken all the same is read later."""
    async with replicas(1, server.url) as (one,):
        await one.put(record("a"), None)
        server.signal(signal.SIGSTOP)
        with pytest.raises(Refused) as caught:
            await one.put(record("b"), None)
        assert caught.value.reason is Reason.STATE_UNAVAILABLE
        server.signal(signal.SIGCONT)
        await is_written(one, "b")
        assert [found.name for found in one.all()] == ["a", "b"]


async def test_a_write_waits_for_live_members_only(server: Server) -> None:
    """It returns when the slowest of those that beat has read it, or does not beat any more."""
    link = link_to(server.url)
    members = RedisMembers(link, Bounds(ttl_ns=10**9, attempt_ns=10**9))
    registry = RedisRegistry(link_to(server.url), "one", member_ttl_s=1.0)
    await registry.start()
    assert [standing.member.name for standing in (await members.beat(beat_of("slow"), "", 0)).standings] == ["slow"]
    read = [0]
    beating = asyncio.create_task(beat_for_ever(members, "slow", read))
    writing = asyncio.create_task(registry.put(record("a"), None))
    await until(lambda: registry.last_change == 1)
    assert not writing.done()
    read.append(1)
    assert await writing == 1
    await ended(beating)
    assert await registry.put(record("b"), None) == 2  # it is not heard of any more
    await registry.close()
    await link.close()
