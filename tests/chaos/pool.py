"""Three replicas of a pool as processes, with what they need, and ways to hurt each."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from sidecar.proto import admin_pb2, admin_pb2_grpc
from tests.chaos.engine_log import EngineLog
from tests.e2e.envoy.server import EnvoyServer
from tests.kit.emulated import EngineProcess
from tests.kit.peft_files import write_adapter
from tests.kit.ports import free_port
from tests.kit.redis_servers import Proxy, Server, Watched, cuttable, running, watched
from tests.kit.serving import PATIENCE_S, write_adapters

LEASE_S = 1.0
POISON = "poison"
"""An adapter: the core of whatever replica takes in a request for it raises."""
REPLICAS, ENGINES, ADAPTERS = 3, 2, 8
ENGINE = ("--compute", "none", "--shape", "tiny", "--seats", "32")


@dataclass
class ReplicaProcess:
    """One `sidecar serve`. It keeps its addresses when it is started again, under the same name."""

    name: str
    config: Path
    data: str
    admin: str
    picker: str
    peers: Proxy
    redis: Proxy | None
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)
    is_ready: bool = False
    """It has begun to take requests."""

    async def start(self) -> None:
        """Start and return when it takes requests. Raises RuntimeError if it ends instead."""
        fault = {"LORA_SIDECAR_RAISE_ON": f"Received:{POISON}"}
        self.is_ready = False
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "sidecar", "serve", "--config", str(self.config), "--json",
                stdout=asyncio.subprocess.PIPE, stderr=log, env=os.environ | fault,
            )  # fmt: skip
        assert self.process.stdout is not None
        if not await self.process.stdout.readline():
            raise RuntimeError(f"{self.name} did not start: {self.log.read_text()[-2000:]}")
        self.is_ready = True

    @property
    def log(self) -> Path:
        return self.config.with_suffix(".log")

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.returncode is None

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait until the process ends and return its exit code."""
        assert self.process is not None
        code = await self.process.wait()
        self.process._transport.close()  # type: ignore[attr-defined]
        return code

    async def kill(self) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await self.ended()

    async def owns(self) -> dict[str, str]:
        """Return the replica that owns each backend, by name, as this one knows. Raises AioRpcError."""
        async with grpc.aio.insecure_channel(self.admin) as channel:
            stub = admin_pb2_grpc.ReplicasStub(channel)
            listed = await stub.List(admin_pb2.ListReplicasRequest(), timeout=5)
        return {owned.backend: each.name for each in listed.replicas for owned in each.owns}


@dataclass
class ChaosPool:
    """The processes. `redis` is the Redis that there is, or the ones that a Sentinel watches."""

    replicas: list[ReplicaProcess]
    engines: list[EngineProcess]
    logs: list[EngineLog]
    redis: Server | Watched
    envoy: EnvoyServer | None = None
    """What clients ask in the Envoy lane: it asks any of the replicas."""
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def backends(self) -> list[str]:
        return [f"b{number}" for number in range(len(self.engines))]

    def named(self, name: str) -> ReplicaProcess:
        (found,) = [replica for replica in self.replicas if replica.name == name]
        return found

    async def owner(self) -> ReplicaProcess:
        """Return the replica that owns the first backend."""
        return self.named((await self.until_settled(self.replicas))["b0"])

    async def until_settled(self, replicas: list[ReplicaProcess]) -> dict[str, str]:
        """Wait until each backend has an owner and these replicas agree on it; return the owners' names.

        What another deed does to a replica meanwhile, so that it does not answer, is waited out.
        """
        async with asyncio.timeout(PATIENCE_S):
            while True:
                told = await asyncio.gather(*(replica.owns() for replica in replicas), return_exceptions=True)
                first = told[0]
                if isinstance(first, dict) and set(first) == set(self.backends) and all(each == first for each in told):
                    return first
                for each in told:
                    if isinstance(each, BaseException) and not isinstance(each, grpc.aio.AioRpcError):
                        raise each
                await asyncio.sleep(0.05)

    async def read_digests(self) -> None:
        async with grpc.aio.insecure_channel(self.replicas[0].admin) as channel:
            listed = await admin_pb2_grpc.AdaptersStub(channel).List(admin_pb2.ListAdaptersRequest())
        self.digests = {adapter.name: adapter.digest for adapter in listed.adapters if adapter.name != POISON}


@asynccontextmanager
async def chaos_pool(
    folder: Path,
    sentinel: bool = False,
    engine_count: int = ENGINES,
    has_envoy: bool = False,
) -> AsyncIterator[ChaosPool]:
    """Run a pool for a block; it begins when every backend has an owner that all know of."""
    write_adapters(folder / "adapters", ADAPTERS)
    write_adapter(folder / "adapters" / POISON, seed=ADAPTERS)
    async with AsyncExitStack() as stack:
        redis: Server | Watched
        if sentinel:
            redis = await stack.enter_async_context(watched(folder / "redis"))
        else:
            redis = await stack.enter_async_context(running(folder / "redis"))
        engines, logs = [], []
        for number in range(engine_count):
            log = EngineLog(folder / f"engine-{number}.jsonl")
            engine = EngineProcess(*ENGINE, "--served-log", str(log.path), time_scale=1.0)
            engines.append(await stack.enter_async_context(engine))
            logs.append(log)
        replicas = []
        for number in range(REPLICAS):
            replica = await _replica(stack, number, folder, redis, engines)
            replicas.append(replica)
            stack.push_async_callback(replica.kill)
        await asyncio.gather(*(replica.start() for replica in replicas))
        pool = ChaosPool(replicas, engines, logs, redis)
        if has_envoy:
            pickers = [replica.picker for replica in replicas]
            pool.envoy = EnvoyServer(folder / "envoy", pickers)
            await stack.enter_async_context(pool.envoy)
        await pool.until_settled(replicas)
        await pool.read_digests()
        yield pool


async def _replica(
    stack: AsyncExitStack,
    number: int,
    folder: Path,
    redis: Server | Watched,
    engines: list[EngineProcess],
) -> ReplicaProcess:
    """Return a replica that is reached by the others, and reaches Redis, by ways that can be cut."""
    data, admin, picker, listens = (f"127.0.0.1:{free_port()}" for _ in range(4))
    peers = Proxy(int(listens.rpartition(":")[2]))
    await peers.mend()
    stack.push_async_callback(peers.cut)
    way = None if isinstance(redis, Watched) else await stack.enter_async_context(cuttable(redis))
    config: dict[str, Any] = {
        "backends": [
            {
                "url": f"triton://{engine.grpc_address}",
                "id": f"b{at}",
                "metrics": f"http://{engine.metrics_address}/metrics",
            }
            for at, engine in enumerate(engines)
        ],
        "listeners": {
            "data": {"address": data},
            "admin": {"address": admin},
            "http": {"address": "127.0.0.1:0"},
            "endpoint_picker": {"address": picker},
        },
        "adapters": {"serve": str(folder / "adapters"), "roots": [str(folder)]},
        "state": {"url": redis.url if way is None else way.url},
        "replicas": {
            "address": listens, "advertise": f"127.0.0.1:{peers.port}", "name": f"r{number}", "lease_s": LEASE_S
        },
    }  # fmt: skip
    path = folder / f"replica-{number}.yaml"
    path.write_text(json.dumps(config))
    return ReplicaProcess(f"r{number}", path, data, admin, picker, peers, way)
