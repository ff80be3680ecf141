"""What is done to a pool all the while. The first replica is spared: it is the one whose memory is watched longest."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random

from tests.chaos.pool import LEASE_S, ChaosPool
from tests.kit.redis_servers import Server

AWAY_S = (0.5 * LEASE_S, 4 * LEASE_S)

Deed = Callable[[ChaosPool, Random], Awaitable[None]]


async def kill_a_replica(pool: ChaosPool, random: Random) -> None:
    replica = random.choice(pool.replicas[1:])
    await replica.kill()
    await asyncio.sleep(random.uniform(*AWAY_S))
    await replica.start()


async def kill_an_engine(pool: ChaosPool, random: Random) -> None:
    engine = random.choice(pool.engines)
    await engine.kill()
    await asyncio.sleep(random.uniform(*AWAY_S))
    await engine.start()


async def kill_redis(pool: ChaosPool, random: Random) -> None:
    """What it held is gone; the replicas put it back."""
    assert isinstance(pool.redis, Server)
    await pool.redis.kill()
    await asyncio.sleep(random.uniform(*AWAY_S))
    await pool.redis.start()


async def part_from_redis(pool: ChaosPool, random: Random) -> None:
    replica = random.choice(pool.replicas)
    assert replica.redis is not None
    await replica.redis.cut()
    await asyncio.sleep(random.uniform(*AWAY_S))
    await replica.redis.mend()


async def part_replicas(pool: ChaosPool, random: Random) -> None:
    replica = random.choice(pool.replicas)
    await replica.peers.cut()
    await asyncio.sleep(random.uniform(*AWAY_S))
    await replica.peers.mend()


DEEDS: tuple[tuple[str, Deed], ...] = (
    ("replicas killed", kill_a_replica),
    ("engines killed", kill_an_engine),
    ("Redis killed", kill_redis),
    ("cut off from Redis", part_from_redis),
    ("cut off from each other", part_replicas),
)
