"""Clients that keep a sidecar busy while its engines are broken and mended."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import grpc.aio

from sidecar.core.facts import Layout, packed_key, task_id_of
from sidecar.lab.engine.kserve.compute import dummy_token
from sidecar.lab.engine.tokens import BOS
from sidecar.proto import gateway_pb2
from tests.kit.faults import Tried, assert_broken_off
from tests.kit.serving import PATIENCE_S, Serving, until


def expected_as(served: Serving, name: str, count: int, dtype: str) -> list[int]:
    """Return the tokens of an adapter that was packed in a type: an engine of another gives others."""
    task_id = task_id_of(packed_key(served.state.names[name].digest, Layout(dtype)))
    return [dummy_token(task_id, position) for position in range(count)]


@dataclass
class Client:
    """What one client is being told at the moment, and whether that has ended."""

    tried: Tried
    tokens: int
    ended: bool = False

    @property
    def has_begun(self) -> bool:
        return bool(self.tried.tokens) and not self.ended


class Clients:
    """Some clients at a time, each asking again as soon as it is answered; every other one wants a stream.

    `dtypes` are the types that engines may have while they ask.
    """

    def __init__(
        self,
        served: Serving,
        names: Sequence[str],
        count: int = 24,
        tokens: int = 30,
        dtypes: Sequence[str] = ("float16",),
    ) -> None:
        self._served = served
        self._names = names
        self._tokens = tokens
        self._dtypes = dtypes
        self._numbers = itertools.count()
        self._random = random.Random(3)
        self._count = count
        self._going = True
        self._tasks: list[asyncio.Task[None]] = []
        self.all: list[Client] = []

    async def __aenter__(self) -> Clients:
        self._tasks = [asyncio.create_task(self._ask_on()) for _ in range(self._count)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def begun(self) -> list[Client]:
        """Those who have been told a part of their answer."""
        return [client for client in self.all if client.has_begun]

    @property
    def waiting(self) -> int:
        """How many have an answer to come, begun or not."""
        return sum(not client.ended for client in self.all)

    @property
    def right(self) -> int:
        """How many have got a whole answer."""
        return sum(client.ended and client.tried.error is None for client in self.all)

    async def answers(self, count: int) -> None:
        """Wait until so many more have got a whole answer."""
        before = self.right
        await until(lambda: self.right >= before + count)

    async def finish(self) -> list[Tried]:
        """Let all come to their end; returns those that failed.

        Each of these has been told a part, right so far, and that it ends there; all others the whole, once.
        """
        self._going = False
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*self._tasks)
        for client in self.all:
            tried = client.tried
            if tried.error is not None:
                assert_broken_off(self._served, tried)
                continue
            assert tried.tokens in [expected_as(self._served, tried.name, client.tokens, one) for one in self._dtypes]
            assert len(tried.origins) == 1
        return [client.tried for client in self.all if client.tried.error is not None]

    async def _ask_on(self) -> None:
        while self._going:
            number = next(self._numbers)
            client = Client(Tried(self._random.choice(self._names)), self._tokens + number % 5)
            self.all.append(client)
            await self._ask(client, stream=bool(number % 2))

    async def _ask(self, client: Client, stream: bool) -> None:
        request = gateway_pb2.GenerateRequest(
            adapter=client.tried.name,
            tokens=gateway_pb2.TokenIds(ids=[BOS, 1, 2, 3]),
            max_tokens=client.tokens,
            **({"stream": stream} if self._may_choose else {}),
        )
        try:
            async for response in self._served.gateway.Generate(request):
                client.tried.tokens += response.token_ids
                if response.HasField("origin"):
                    client.tried.origins.append(response.origin)
        except grpc.aio.AioRpcError as error:
            client.tried.error = error
        client.ended = True

    @property
    def _may_choose(self) -> bool:
        """An engine that cannot stream refuses who asks for it."""
        return self._served.sidecar.gateway.backends["trt-0"].streams
