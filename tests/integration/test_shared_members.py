"""Members and leases in a real Redis, beside the model that ownership is simulated with: they answer alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from sidecar.errors import Misused, Reason, Refused
from sidecar.ownership import effects as do
from sidecar.ownership.events import LeaseAnswered
from sidecar.ownership.facts import Bounds, Member
from sidecar.state.redis.members import RedisMembers
from tests.kit.cases import first
from tests.kit.redis_servers import Server, running
from tests.kit.registries import link_to
from tests.worlds.ownership.redis import Data
from tests.worlds.ownership.redis import Redis as Model

MS = 1_000_000
SHORT = Bounds(ttl_ns=60 * MS, margin_ns=MS, ask_ns=30 * MS, attempt_ns=40 * MS)
MEMBERS = tuple(Member(f"id-{name}", name, weight) for name, weight in (("a", 1.0), ("b", 0.5), ("c", 2.0)))
BACKENDS = ("gpu-0", "gpu-1")
KEPT_NS = 100 * MS
"""For how long a lease that was given back is known."""


@pytest.fixture(params=("redis-server", "valkey-server"))
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Server]:
    async with running(tmp_path / "server", request.param) as server:
        yield server


@dataclass
class Pair:
    """A real Redis and the model, asked the same at the same time, which is the real one's."""

    members: RedisMembers
    random: Random
    model: Model = field(default_factory=lambda: Model(SHORT, "", Data(), KEPT_NS))
    forgotten: int = 0
    number: int = 0
    now_ns: int = 0
    granted: int = 0
    refused: int = 0

    def next(self) -> int:
        self.number += 1
        return self.number

    def at(self, generation: str, now_ns: int) -> int:
        self.model.process = generation
        self.now_ns = now_ns
        return now_ns

    def same(self, real: LeaseAnswered, modelled: LeaseAnswered) -> None:
        assert real == modelled
        self.granted += real.granted
        self.refused += not real.granted

    async def beat(self) -> None:
        call = do.SendBeat(self.next(), self.random.choice(MEMBERS))
        beat = await self.members.beat(call, '{"address": "x:1"}', self.number)
        real, known = beat.answered, len(self.model.data.leases)
        assert real == self.model.beat(call.number, call.member, self.at(real.generation, real.redis_ns))
        self.forgotten += known - len(self.model.data.leases)
        assert {standing.info for standing in beat.standings} == {'{"address": "x:1"}'}

    async def acquire(self) -> None:
        member, others = self.random.choice(MEMBERS), [each.id for each in MEMBERS]
        call = do.SendAcquire(
            self.next(),
            self.random.choice(BACKENDS),
            f"token-{member.name}-{self.random.randrange(2)}",
            self.random.choice((0, 7, self.now_ns // MS + 5)),
            tuple(self.random.sample(others, self.random.randrange(3))),
            tuple(self.random.sample(others, self.random.randrange(4))),
            self.random.random() < 0.3,
            self.random.choice((self.model.process,) * 5 + ("another",)),
            self.now_ns + self.random.choice((-MS, 10_000 * MS, 10_000 * MS)),
        )
        real = await self.members.acquire(call, member)
        self.same(real, self.model.acquire(call, member, self.at(real.generation, real.redis_ns)))

    async def renew(self) -> None:
        member = self.random.choice(MEMBERS)
        number = self.next() - self.random.choice((0, 0, 3))
        token = f"token-{member.name}-{self.random.randrange(2)}"
        call = do.SendRenew(number, self.random.choice(BACKENDS), token, (self.random.choice(MEMBERS).id,))
        real = await self.members.renew(call)
        self.same(real, self.model.renew(call, self.at(real.generation, real.redis_ns)))

    async def release(self) -> None:
        token = f"token-{self.random.choice(MEMBERS).name}-{self.random.randrange(2)}"
        call = do.SendRelease(self.random.choice(BACKENDS), token)
        await self.members.release(call)
        self.model.release(call, self.now_ns)

    async def leave(self) -> None:
        call = do.SendLeave(self.random.choice(MEMBERS).id)
        await self.members.leave(call)
        self.model.leave(call.member, self.now_ns)

    async def wait(self) -> None:
        """Let leases and members end: the time is Redis' own."""
        await asyncio.sleep(self.random.choice((0.01, 0.04, 0.09, 0.2)))


@pytest.mark.parametrize("seed", first(1, range(4)))
async def test_redis_answers_as_the_model_does(server: Server, seed: int) -> None:
    """Beats, leases, releases and departures, with a restart that keeps the data and one that loses it."""
    link = link_to(server.url)
    pair = Pair(RedisMembers(link, SHORT, KEPT_NS / 1e9), Random(seed))
    steps = [pair.beat] * 3 + [pair.acquire] * 6 + [pair.renew] * 4 + [pair.release] * 2 + [pair.leave, pair.wait]
    for restart in ("none", "kept", "lost"):
        if restart == "kept":
            async with server.client() as client:
                await client.save()
        if restart != "none":
            await server.kill()
            if restart == "lost":
                (server.folder / "dump.rdb").unlink()
                pair.model.data = Data()
            await server.start()
        await pair.beat()
        for _ in range(100):
            await pair.random.choice(steps)()
    assert pair.granted > 20
    assert pair.refused > 20
    assert pair.forgotten
    await link.close()


async def test_while_redis_is_away_nothing_is_granted(server: Server) -> None:
    """Every question is answered with STATE_UNAVAILABLE, naming the server."""
    link = link_to(server.url)
    members = RedisMembers(link, SHORT)
    await server.kill()
    for question in (
        members.beat(do.SendBeat(1, MEMBERS[0]), "", 0),
        members.renew(do.SendRenew(2, "gpu-0", "t", ())),
        members.release(do.SendRelease("gpu-0", "t")),
    ):
        with pytest.raises(Refused, match=server.address) as caught:
            await question
        assert caught.value.reason is Reason.STATE_UNAVAILABLE
    await link.close()


@pytest.mark.parametrize("report", ['[5, "new", 1.0, false, "pod-1:9003"]', '["old", 1.0, false, "pod-1:9003"]'])
async def test_a_replica_of_another_wire_format_is_refused_by_name(server: Server, report: str) -> None:
    """The one that comes later does not start; one that has started leaves a later one out of the pool."""
    link = link_to(server.url)
    members = RedisMembers(link)
    await members.refuse_other_wires()
    await members.beat(do.SendBeat(1, MEMBERS[0]), "here", 0)
    await members.refuse_other_wires()  # it is of ours
    async with server.client() as client:
        seconds, micros = await client.time()
        await client.hset(link.key("members"), "id-x", report)
        await client.zadd(link.key("beats"), {"id-x": seconds * 1_000_000 + micros})
    with pytest.raises(Misused, match=r'replica "(new|old)" has wire format [05], and this version has 4') as caught:
        await members.refuse_other_wires()
    assert caught.value.reason is Reason.STATE_INCOMPATIBLE
    beat = await members.beat(do.SendBeat(2, MEMBERS[0]), "here", 0)
    assert [standing.member for standing in beat.standings] == [MEMBERS[0]]
    await link.close()
