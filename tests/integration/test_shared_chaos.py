"""Replicas, writers and a Redis to which everything happens: all end alike, and what was acknowledged stands."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from sidecar.errors import Reason, Refused
from sidecar.ownership.effects import SendBeat
from sidecar.ownership.facts import Bounds, Member
from sidecar.state.records import Record
from sidecar.state.redis.members import RedisMembers
from sidecar.state.redis.registry import RedisRegistry
from sidecar.state.registry import Change
from sidecar.tasks import ended
from tests.kit.redis_servers import Proxy, Server, cuttable, running
from tests.kit.registries import link_to, record
from tests.kit.serving import until

NAMES = ("a", "b", "c", "d")
KEYS = ("meta", "adapters", "changes", "tombstones")
BOUNDS = Bounds(ttl_ns=10**9, attempt_ns=10**9)
EXPECTED = {Reason.STATE_UNAVAILABLE, Reason.CHANGED_MEANWHILE}


@dataclass
class World:
    """Three replicas that beat, each behind a way to the server that can be cut; states of a name are counted."""

    server: Server
    random: Random
    replicas: list[RedisRegistry] = field(default_factory=list)
    proxies: list[Proxy] = field(default_factory=list)
    told: list[list[Change]] = field(default_factory=list)
    written: int = 0
    tried: dict[str, dict[int, Record | None]] = field(default_factory=lambda: {name: {} for name in NAMES})
    acknowledged: dict[str, int] = field(default_factory=dict)

    async def write(self, replica: RedisRegistry, name: str) -> None:
        """Change a name as somebody who looks first; what becomes of it may stay unknown."""
        self.written += 1
        state, before, least = self.written, replica.get(name), self.acknowledged.get(name, 0)
        after = None if before is not None and self.random.random() < 0.2 else record(name, state)
        self.tried[name][state] = after
        try:
            if after is None:
                assert before is not None
                await replica.delete(name, before)
            else:
                await replica.put(after, before)
        except Refused as refused:
            if refused.reason not in EXPECTED:
                raise
        else:
            built_on = least if before is None else int(before.adapter.digest, 16)
            assert built_on >= least, f"state {state} of {name} undid {least}"
            self.acknowledged[name] = max(state, self.acknowledged.get(name, 0))

    async def write_for_a_while(self, replica: RedisRegistry) -> None:
        for _ in range(25):
            await self.write(replica, self.random.choice(NAMES))
            await asyncio.sleep(self.random.uniform(0, 0.1))

    async def lose(self) -> None:
        """Restart the server from what it was last told to save, or empty."""
        dump = self.server.folder / "dump.rdb"
        await self.server.kill()
        if self.random.random() < 0.5:
            dump.unlink(missing_ok=True)
        await self.server.start()

    async def damage(self) -> None:
        async with self.server.client() as client:
            if self.random.random() < 0.5:
                await client.save()
            else:
                await client.delete("{lora-sidecar}:" + self.random.choice(KEYS))

    async def cut(self) -> None:
        """Cut one replica off for a moment."""
        proxy = self.random.choice(self.proxies)
        await proxy.cut()
        await asyncio.sleep(self.random.uniform(0, 0.5))
        await proxy.mend()


async def beat_for_ever(members: RedisMembers, name: str, replica: RedisRegistry) -> None:
    while True:
        with suppress(Refused):
            await members.beat(SendBeat(1, Member(name, name)), "", replica.last_change)
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("faults", ["losses", "cuts"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
async def test_all_end_alike_and_nothing_acknowledged_is_lost(tmp_path: Path, faults: str, seed: int) -> None:
    """Each name ends in a state that was asked for, and in none from before the last that was acknowledged."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(tmp_path / "server"))
        world = World(server, Random(f"{faults} {seed}"))
        for name in ("one", "two", "three"):
            proxy = await stack.enter_async_context(cuttable(server))
            link = link_to(proxy.url)
            stack.push_async_callback(link.close)
            replica = RedisRegistry(link_to(proxy.url), name, member_ttl_s=1.0)
            await replica.start()
            stack.push_async_callback(replica.close)
            beating = asyncio.create_task(beat_for_ever(RedisMembers(link, BOUNDS), name, replica))
            stack.push_async_callback(ended, beating)
            world.replicas.append(replica)
            world.proxies.append(proxy)
            heard: list[Change] = []
            replica.subscribe(heard.append)
            world.told.append(heard)
        writing = [asyncio.create_task(world.write_for_a_while(replica)) for replica in world.replicas]
        while not all(task.done() for task in writing):
            await world.random.choice([world.lose, world.damage] if faults == "losses" else [world.cut])()
            await asyncio.sleep(world.random.uniform(0, 1.5))
        await asyncio.gather(*writing)
        await world.write(world.replicas[0], "a")
        await until(lambda: all(replica.away_since is None and not replica.lag for replica in world.replicas))
        one, two, three = world.replicas
        await until(
            lambda: one.all() == two.all() == three.all() and one.last_change == two.last_change == three.last_change
        )
        late = RedisRegistry(link_to(server.url))
        await late.start()
        stack.push_async_callback(late.close)
        assert late.all() == one.all()
        for name in NAMES:
            least = world.acknowledged.get(name, 0)
            possible = [state for number, state in world.tried[name].items() if number >= least]
            assert not least or one.get(name) in possible, f"{name} is from before {least}"
        for replica, heard in zip(world.replicas, world.told, strict=True):
            told = {change.name: change.record for change in heard}
            assert {name: replica.get(name) for name in told} == told
        assert world.acknowledged
