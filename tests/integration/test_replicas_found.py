"""Several replicas, each of which finds the engines by itself: what one knows earlier than the others loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.effects import Dispatch, Settle
from sidecar.core.events import BackendPlanned
from sidecar.errors import Reason
from tests.kit.found_engines import Names, Pool, loaded, pool_of, served
from tests.kit.redis_servers import running
from tests.kit.replica_pool import LEASE_S, owned
from tests.kit.serving import Serving, until, write_adapters


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    write_adapters(tmp_path / "adapters", 8)
    return tmp_path / "adapters"


class Eyes:
    """What each replica sees: the pool's names, or names of its own."""

    def __init__(self, pool: Pool, count: int) -> None:
        self._pool = pool
        self.of = [Names() for _ in range(count)]
        for names in self.of:
            names.addresses = list(pool.names.addresses)

    def see(self, address: str, *replicas: int) -> None:
        for number in replicas or range(len(self.of)):
            self.of[number].addresses.append(address)

    def lose(self, address: str, *replicas: int) -> None:
        for number in replicas or range(len(self.of)):
            self.of[number].addresses.remove(address)


@asynccontextmanager
async def replicas(eyes: Eyes, pool: Pool, url: str, adapters: Path, **record: Any) -> AsyncIterator[list[Serving]]:
    """Run a replica for each pair of eyes; the block begins when each engine is served by one of them."""
    async with AsyncExitStack() as stack:
        found = []
        for number, names in enumerate(eyes.of):
            config = pool.config(
                adapters,
                state={"url": url},
                replicas={"address": "127.0.0.1:0", "name": f"r{number}", "lease_s": LEASE_S},
                **{key: dict(value) if isinstance(value, dict) else value for key, value in record.items()},
            )
            found.append(await stack.enter_async_context(served(pool, config, names)))
        await until(lambda: is_served_once(found, set(pool.engines)))
        yield found


def served_by(found: Sequence[Serving]) -> list[str]:
    return sorted(backend for serving in found for backend in owned(serving))


def is_served_once(found: Sequence[Serving], addresses: set[str]) -> bool:
    """Whether each of these engines is served by one replica, and all know by which."""
    wanted = sorted(f"gpu-{address}" for address in addresses)
    owners = {backend: serving.sidecar.replica.member.id for serving in found for backend in owned(serving)}
    return served_by(found) == wanted and all(
        serving.sidecar.replica.board.owner_of(backend) == owner
        for serving in found
        for backend, owner in owners.items()
    )


def ended_well(found: Sequence[Serving]) -> bool:
    """Whether nobody but other replicas was ever refused anything."""
    reasons = {ending.reason for serving in found for ending in serving.recorder.of(Settle)}
    return reasons <= {None, Reason.NOT_OWNER, Reason.CANCELLED}


@pytest.mark.slow
async def test_engines_come_and_go_under_load(adapters: Path, tmp_path: Path) -> None:
    """All replicas see it at about the same time; each engine is served by one of them all along."""
    async with running(tmp_path / "redis") as redis, pool_of(3, time_scale=0.02) as pool:
        eyes = Eyes(pool, 3)
        async with replicas(eyes, pool, redis.url, adapters) as found, loaded(*found) as load:
            for _ in range(2):
                await load.more(30)
                new = await pool.start()
                eyes.see(new)
                await until(lambda: is_served_once(found, set(pool.engines)))
                await load.more(30)
                old = next(iter(pool.engines))
                eyes.lose(old)
                await until(lambda: all(f"gpu-{old}" not in one.state.backends for one in found))  # noqa: B023
                await pool.stop(old)
                await until(lambda: is_served_once(found, set(pool.engines)))
            await load.more(30)
            assert ended_well(found)


async def test_an_engine_that_only_one_replica_knows_is_served_by_it(adapters: Path, tmp_path: Path) -> None:
    """Whoever it would belong to by hashing; and when all know it, it is still served by one."""
    async with running(tmp_path / "redis") as redis, pool_of(1, time_scale=0.02) as pool:
        eyes = Eyes(pool, 3)
        async with replicas(eyes, pool, redis.url, adapters) as found, loaded(*found) as load:
            for knows in range(3):
                new = await pool.start()
                eyes.see(new, knows)
                await until(lambda: f"gpu-{new}" in owned(found[knows]))  # noqa: B023
                await load.more(30)
                eyes.see(new, *(each for each in range(3) if each != knows))
                await until(lambda: is_served_once(found, set(pool.engines)))
                await load.more(30)
            assert ended_well(found)


async def test_an_engine_that_its_owner_loses_sight_of_is_served_by_another(adapters: Path, tmp_path: Path) -> None:
    """And by nobody when nobody knows it any more."""
    async with running(tmp_path / "redis") as redis, pool_of(2, time_scale=0.02) as pool:
        eyes = Eyes(pool, 3)
        async with replicas(eyes, pool, redis.url, adapters) as found, loaded(*found) as load:
            address = next(iter(pool.engines))
            for _ in range(2):
                (owner,) = [number for number, one in enumerate(found) if f"gpu-{address}" in owned(one)]
                await load.more(30)
                eyes.lose(address, owner)
                await until(lambda: f"gpu-{address}" not in found[owner].state.backends)  # noqa: B023
                await until(lambda: f"gpu-{address}" in served_by(found))
                await load.more(30)
            (owner,) = [number for number, one in enumerate(found) if f"gpu-{address}" in owned(one)]
            eyes.lose(address, owner)
            await until(lambda: all(f"gpu-{address}" not in one.state.backends for one in found))
            await load.more(30)
            assert ended_well(found)


async def test_a_replica_that_knows_no_engine_passes_requests_on_once_it_does(adapters: Path, tmp_path: Path) -> None:
    """They wait for it there, and then go to whoever owns it."""
    async with running(tmp_path / "redis") as redis, pool_of(1) as pool:
        eyes = Eyes(pool, 2)
        (address,) = pool.engines
        eyes.lose(address, 1)
        async with replicas(eyes, pool, redis.url, adapters) as found:
            waiting = asyncio.create_task(found[1].ask("a00"))
            await until(lambda: len(found[1].state.unrouted) == 1)
            eyes.see(address, 1)
            answer = await waiting
            assert answer.tokens == found[1].expected("a00", 4)
            assert sum(one.recorder.count(Dispatch) for one in found) == 1  # it may have become its own meanwhile


async def test_one_that_is_asked_for_an_engine_it_does_not_know_gives_the_request_back(
    adapters: Path, tmp_path: Path
) -> None:
    """Its owner lost sight of it in this very moment: nobody has told the other replica yet."""
    async with running(tmp_path / "redis") as redis, pool_of(2) as pool:
        eyes = Eyes(pool, 2)
        async with replicas(eyes, pool, redis.url, adapters) as found:
            for address in list(pool.engines):
                (owner,) = [one for one in found if f"gpu-{address}" in owned(one)]
                (other,) = [one for one in found if one is not owner]
                await owner.sidecar.gateway.fleet.remove(f"gpu-{address}", "as the test wants it")
                names = sorted(other.state.names)
                answers = await asyncio.gather(*(other.ask(name) for name in names))
                assert [answer.tokens for answer in answers] == [other.expected(name, 4) for name in names]
                break
            assert ended_well(found)


async def test_an_engine_that_comes_is_spared_until_it_has_what_the_leader_plans(
    adapters: Path, tmp_path: Path
) -> None:
    """Its owner loads that; the others see that it joins."""
    async with running(tmp_path / "redis") as redis, pool_of(1, time_scale=0.02, lora_device_pages=64) as pool:
        eyes = Eyes(pool, 2)
        async with replicas(eyes, pool, redis.url, adapters) as found, loaded(*found) as load:
            await load.more(50)
            new = await pool.start()
            eyes.see(new)
            await until(lambda: f"gpu-{new}" in served_by(found))
            (owner,) = [one for one in found if f"gpu-{new}" in owned(one)]
            assert f"gpu-{new}" in owner.state.joining
            await until(lambda: f"gpu-{new}" not in owner.state.joining)
            told = [event for event in owner.recorder.events if isinstance(event, BackendPlanned)]
            assert [event.backend for event in told] == [f"gpu-{new}"]
            await until(lambda: all(one.sidecar.replica.board.serves(f"gpu-{new}") for one in found))
            await load.more(50)
            assert ended_well(found)
