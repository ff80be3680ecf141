"""Clients as they are written: gRPC's own retries by service config, and streams that are held open for days.

A pool is restarted replica by replica under them, and none of their requests may fail or be lost.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import grpc.aio
from tritonclient.grpc import service_pb2_grpc

from sidecar.lab.engine.tokens import BOS
from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.chaos.load import tokens_of
from tests.chaos.pool import ChaosPool
from tests.kit.emulated import core_request, is_final
from tests.kit.emulated import tokens_of as tokens_in

RETRIES = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": "inference.GRPCInferenceService"}, {"service": "lorasidecar.v1.Gateway"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
"""What the README gives a client that names all replicas in its target."""
OPTIONS = (
    ("grpc.service_config", json.dumps(RETRIES)),
    ("grpc.enable_retries", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
)
CLIENTS, STREAMS, IN_FLIGHT, TOKENS = 4, 3, 3, 40
PAUSE_S = 0.05
AGAIN = ("[DRAINING]", "[NOT_OWNER]", "[NO_BACKEND]", "[BACKEND_UNREACHABLE]")


@dataclass
class Rolling:
    """`wrong` names each request that failed, was lost or was answered otherwise than its adapter does."""

    pool: ChaosPool
    answered: dict[str, int] = field(default_factory=lambda: {"unary": 0, "stream": 0, "kserve": 0})
    reopened: int = 0
    resent: int = 0
    wrong: list[str] = field(default_factory=list)
    is_over: bool = False
    _numbers: Any = field(default_factory=lambda: count(1))

    def expected(self, adapter: str) -> list[int]:
        return tokens_of(self.pool.digests[adapter], TOKENS)

    def adapter(self) -> str:
        names = sorted(self.pool.digests)
        return names[next(self._numbers) % len(names)]

    def judge(self, kind: str, adapter: str, tokens: list[int]) -> None:
        self.answered[kind] += 1
        if tokens != self.expected(adapter):
            self.wrong.append(f"{kind}: {adapter} was answered {bytes(tokens)!r}")

    async def ask(self, stub: Any, streams: bool) -> None:
        """Ask one after the other by a channel to all replicas, whose retries are gRPC's own."""
        kind = "stream" if streams else "unary"
        while not self.is_over:
            adapter = self.adapter()
            ids = gateway_pb2.TokenIds(ids=[BOS, 1, 2, 3])
            request = gateway_pb2.GenerateRequest(adapter=adapter, tokens=ids, max_tokens=TOKENS, stream=streams)
            tokens: list[int] = []
            try:
                async for message in stub.Generate(request, timeout=60):
                    tokens += message.token_ids
            except grpc.aio.AioRpcError as error:
                self.wrong.append(f"{kind}: {error.code().name} {error.details()} after {len(tokens)} tokens")
            else:
                self.judge(kind, adapter, tokens)

    async def hold(self, number: int) -> None:
        """Keep a KServe stream open to one replica, and go to the next one when it is closed."""
        open_requests: dict[str, str] = {}
        while not self.is_over or open_requests:
            replica = self.pool.replicas[number % len(self.pool.replicas)]
            number += 1
            async with grpc.aio.insecure_channel(replica.data) as channel:
                held = Held(self, service_pb2_grpc.GRPCInferenceServiceStub(channel), open_requests)
                await held.run()
            self.reopened += not self.is_over
            await asyncio.sleep(PAUSE_S)


class Held:
    """One stream, from its opening to its end. `requests` are those without an ending, by id; it resends them."""

    def __init__(self, rolling: Rolling, stub: Any, requests: dict[str, str]) -> None:
        self._rolling = rolling
        self._requests = requests
        self._call = stub.ModelStreamInfer()
        self._got: dict[str, list[Any]] = {}
        self._again: set[str] = set()
        self._room = asyncio.Event()

    async def run(self) -> None:
        writing = asyncio.create_task(self._write())
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._take(message)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                self._rolling.wrong.append(f"kserve: {error.code().name} {error.details()}")
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        for request_id in self._got.keys() & self._requests.keys():
            self._rolling.wrong.append(f"kserve: {request_id} was cut off after {len(self._got[request_id])} messages")
            del self._requests[request_id]
        self._rolling.resent += len(self._requests)

    async def _write(self) -> None:
        for request_id in list(self._requests):
            await self._send(request_id)
        while not self._rolling.is_over or self._requests:
            for request_id in list(self._again):
                self._again.discard(request_id)
                await asyncio.sleep(PAUSE_S)
                await self._send(request_id)
            while len(self._requests) < IN_FLIGHT and not self._rolling.is_over:
                request_id = f"r{next(self._rolling._numbers)}"
                self._requests[request_id] = self._rolling.adapter()
                await self._send(request_id)
            self._room.clear()
            await self._room.wait()
        await self._call.done_writing()

    async def _send(self, request_id: str) -> None:
        adapter = self._requests[request_id]
        request = core_request(tokens=TOKENS, streaming=True, lora_name=adapter, request_id=request_id)
        await self._call.write(request)

    def _take(self, message: Any) -> None:
        request_id = message.infer_response.id
        if message.error_message:
            if request_id in self._requests and message.error_message.startswith(AGAIN):
                self._again.add(request_id)
                self._rolling.resent += 1
            else:
                self._rolling.wrong.append(f"kserve: {request_id}: {message.error_message}")
                self._requests.pop(request_id, None)
            self._room.set()
            return
        self._got.setdefault(request_id, []).append(message)
        if is_final(message):
            adapter = self._requests.pop(request_id)
            self._rolling.judge("kserve", adapter, tokens_in(self._got.pop(request_id)))
            self._room.set()


@asynccontextmanager
async def rolling_clients(pool: ChaosPool) -> AsyncIterator[Rolling]:
    """Have clients ask for the length of a block, and wait for the last answers."""
    rolling = Rolling(pool)
    target = "ipv4:" + ",".join(replica.data for replica in pool.replicas)
    async with grpc.aio.insecure_channel(target, options=OPTIONS) as channel:
        stub = gateway_pb2_grpc.GatewayStub(channel)
        tasks = [asyncio.create_task(rolling.ask(stub, number % 2 == 0)) for number in range(CLIENTS)]
        tasks += [asyncio.create_task(rolling.hold(number)) for number in range(STREAMS)]
        yield rolling
        rolling.is_over = True
        await asyncio.gather(*tasks)
