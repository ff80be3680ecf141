"""Who comes to a pool beside the steady load: tenants and adapters for a while, slow readers, bursts, and noise."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio

from sidecar.proto import admin_pb2, admin_pb2_grpc, gateway_pb2
from tests.chaos.load import Load
from tests.kit.peft_files import write_adapter

PAUSE_S = 0.3
BURST = 100
SILENCE_S_MAX = 15.0
ASKS_A_VISIT = 6
CHANGE_S = 30.0
"""How long one call may take that changes a name; it is made again until it is done."""
METHODS = ("/lorasidecar.v1.Gateway/Generate", "/inference.GRPCInferenceService/ModelInfer", "/no.such.Service/Method")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Crowd:
    """`run` keeps everybody coming until it is cancelled. What is asked is judged by the load."""

    def __init__(self, load: Load, folder: Path, seed: int) -> None:
        self._load = load
        self._folder = folder
        self._random = Random(seed)
        self._numbers = count(1)
        self.visits = 0
        self.noises = 0

    async def run(self) -> None:
        """Come and go, for ever."""
        async with asyncio.TaskGroup() as group:
            for task in (self._visitors, self._visitors, self._tenants, self._slow_readers, self._bursts, self._noise):
                group.create_task(task())

    async def _visitors(self) -> None:
        """Adapters that are registered, asked for at any replica, and forgotten."""
        while True:
            number = next(self._numbers)
            name, folder = f"visitor-{number}", self._folder / f"visitor-{number}"
            await asyncio.to_thread(write_adapter, folder, seed=10_000 + number)
            request = admin_pb2.RegisterRequest(name=name, path=str(folder))
            digest = (await self._changed(lambda stub, r=request: stub.Register(r, timeout=CHANGE_S))).adapter.digest
            asks = [self._load.ask(self._own(), name, digest, f"guest-{number}") for _ in range(ASKS_A_VISIT)]
            await asyncio.wait([self._load.begin(ask) for ask in asks])
            gone = admin_pb2.UnregisterRequest(name=name)
            await self._changed(lambda stub, r=gone: stub.Unregister(r, timeout=CHANGE_S))
            await asyncio.to_thread(shutil.rmtree, folder)
            self.visits += 1
            await asyncio.sleep(PAUSE_S)

    async def _changed(self, change: Callable[[Any], Awaitable[Any]]) -> Any:
        """Have a name changed by any replica, at whatever time one can. A name that is gone already is changed."""
        while True:
            replica = self._random.choice(self._load.pool.replicas)
            try:
                async with grpc.aio.insecure_channel(replica.admin) as channel:
                    return await change(admin_pb2_grpc.AdaptersStub(channel))
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return None
                if error.code() not in (
                    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.DEADLINE_EXCEEDED
                ):  # fmt: skip
                    raise
                await asyncio.sleep(PAUSE_S)

    async def _tenants(self) -> None:
        """One request a tenant, and never again."""
        while True:
            adapter = self._random.choice(sorted(self._load.pool.digests))
            digest = self._load.pool.digests[adapter]
            self._load.begin(self._load.ask(self._own(), adapter, digest, f"tenant-{next(self._numbers)}"))
            await asyncio.sleep(self._random.expovariate(2.0))

    async def _slow_readers(self) -> None:
        while True:
            adapter = self._random.choice(sorted(self._load.pool.digests))
            silence_s = self._random.uniform(1.0, SILENCE_S_MAX)
            digest = self._load.pool.digests[adapter]
            self._load.begin(self._load.ask(self._own(), adapter, digest, "slow", silence_s))
            await asyncio.sleep(self._random.expovariate(0.5))

    async def _bursts(self) -> None:
        while True:
            await asyncio.sleep(self._random.uniform(15.0, 30.0))
            adapter = self._random.choice(sorted(self._load.pool.digests))
            for _ in range(BURST):
                digest = self._load.pool.digests[adapter]
                self._load.begin(self._load.ask(self._own(), adapter, digest, "burst"))

    async def _noise(self) -> None:
        """Bytes that are no message, and messages that are no request. What becomes of them is not looked at."""
        while True:
            replica = self._random.choice(self._load.pool.replicas)
            address = self._random.choice((replica.data, replica.admin))
            data = self._random.randbytes(self._random.randrange(1, 4096))
            with contextlib.suppress(OSError, grpc.aio.AioRpcError):
                if self._random.random() < 0.5:
                    await _send(address, self._random.choice((b"", PREFACE)) + data)
                else:
                    await self._call(replica.data, self._damaged(data))
            self.noises += 1
            await asyncio.sleep(PAUSE_S)

    def _damaged(self, data: bytes) -> bytes:
        """Return a request with a few bytes changed, or bytes that never were one."""
        adapter = self._random.choice(sorted(self._load.pool.digests))
        tokens = gateway_pb2.TokenIds(ids=[1, 2, 3])
        message = bytearray(
            gateway_pb2.GenerateRequest(adapter=adapter, tokens=tokens, max_tokens=4).SerializeToString()
        )
        for _ in range(self._random.randrange(1, 4)):
            message[self._random.randrange(len(message))] = self._random.randrange(256)
        return self._random.choice((bytes(message), data))

    async def _call(self, address: str, message: bytes) -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_stream(self._random.choice(METHODS))
            async for _ in call(message, timeout=5.0):
                pass

    def _own(self) -> Random:
        return Random(self._random.random())


async def _send(address: str, data: bytes) -> None:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(1.0):
            await reader.read()
    except TimeoutError:
        pass
    finally:
        writer.close()
