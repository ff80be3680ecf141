"""Redis away for minutes while replicas are asked as fast as they answer: what of the throughput is left."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import grpc.aio

from sidecar.lab.engine.tokens import BOS
from sidecar.proto import admin_pb2, admin_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from tests.chaos.load import tokens_of
from tests.chaos.pool import ChaosPool
from tests.kit.peft_files import write_adapter
from tests.kit.redis_servers import Server
from tests.kit.serving import PATIENCE_S

CLIENTS, TOKENS = 16, 40
SHARE_MIN = 0.95
REGISTER_EVERY_S = 5.0


@dataclass
class Away:
    """Answers a second with Redis there, before and after, and without it; what was said to who registered then."""

    with_redis: float = 0.0
    without: float = 0.0
    refusals: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        return self.without / self.with_redis


async def away(pool: ChaosPool, folder: Path, calm_s: float, away_s: float) -> Away:
    """Kill Redis for `away_s` between two calm times. It comes back empty, and must end with all names in it."""
    assert isinstance(pool.redis, Server)
    told, asked = Away(), _Asked(pool)
    asking = [asyncio.create_task(asked.ask_on(told)) for _ in range(CLIENTS)]
    await asyncio.sleep(min(5.0, calm_s))
    before = await asked.rate(calm_s)
    await pool.redis.kill()
    registering = asyncio.create_task(_register(pool, folder, told))
    told.without = await asked.rate(away_s)
    registering.cancel()
    await asyncio.gather(registering, return_exceptions=True)
    await pool.redis.start()
    told.with_redis = (before + await asked.rate(calm_s)) / 2
    asked.is_over = True
    await asyncio.gather(*asking)
    await _registers_again(pool, folder, told)
    return told


class _Asked:
    """Clients of all replicas in turn, each asking again as soon as it is answered."""

    def __init__(self, pool: ChaosPool) -> None:
        self.is_over = False
        self._pool = pool
        self._answered = 0
        self._numbers = count()

    async def rate(self, seconds: float) -> float:
        """Return how many a second are answered from now on."""
        began_s, before = monotonic(), self._answered
        await asyncio.sleep(seconds)
        return (self._answered - before) / (monotonic() - began_s)

    async def ask_on(self, told: Away) -> None:
        names = sorted(self._pool.digests)
        channels = [grpc.aio.insecure_channel(replica.data) for replica in self._pool.replicas]
        stubs = [gateway_pb2_grpc.GatewayStub(channel) for channel in channels]
        while not self.is_over:
            number = next(self._numbers)
            name = names[number % len(names)]
            try:
                tokens = await _ask(stubs[number % len(stubs)], name)
            except grpc.aio.AioRpcError as error:
                told.wrong.append(f"{name}: {error.code().name} {error.details()}")
                continue
            self._answered += 1
            if tokens != tokens_of(self._pool.digests[name], TOKENS):
                told.wrong.append(f"{name} was answered {bytes(tokens)!r}")
        for channel in channels:
            await channel.close()


async def _ask(stub: Any, name: str) -> list[int]:
    ids = gateway_pb2.TokenIds(ids=[BOS, 1, 2, 3])
    request = gateway_pb2.GenerateRequest(adapter=name, tokens=ids, max_tokens=TOKENS)
    tokens: list[int] = []
    async for message in stub.Generate(request, timeout=PATIENCE_S):
        tokens += message.token_ids
    return tokens


async def _register(pool: ChaosPool, folder: Path, told: Away) -> None:
    """Try to register, now and then, and note what is said."""
    for number in count():
        error = await _try_to_register(pool, folder, f"late{number}")
        if error is None:
            told.wrong.append(f"late{number} was registered without Redis")
        else:
            told.refusals[f"{error.code().name} {error.details()}".replace(f"late{number}", "NAME")] += 1
        await asyncio.sleep(REGISTER_EVERY_S)


async def _registers_again(pool: ChaosPool, folder: Path, told: Away) -> None:
    """Nothing is lost at its return: all names are there, and a new one can be added and asked for anywhere."""
    error = await _try_to_register(pool, folder, "anew")
    if error is not None:
        told.wrong.append(f"anew cannot be registered after Redis is back: {error.details()}")
        return
    await pool.read_digests()
    for replica in pool.replicas:
        async with grpc.aio.insecure_channel(replica.data) as channel:
            for name in sorted(pool.digests):
                if await _ask(gateway_pb2_grpc.GatewayStub(channel), name) != tokens_of(pool.digests[name], TOKENS):
                    told.wrong.append(f"{name} is not answered as it should be by {replica.name}")


async def _try_to_register(pool: ChaosPool, folder: Path, name: str) -> grpc.aio.AioRpcError | None:
    path = folder / "adapters" / "more"
    if not path.exists():
        write_adapter(path, seed=77)
    async with grpc.aio.insecure_channel(pool.replicas[0].admin) as channel:
        stub = admin_pb2_grpc.AdaptersStub(channel)
        try:
            await stub.Register(admin_pb2.RegisterRequest(name=name, path=str(path)), timeout=PATIENCE_S)
        except grpc.aio.AioRpcError as error:
            return error
    return None
