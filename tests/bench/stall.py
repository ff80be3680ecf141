"""What others feel of a 300 MB adapter: it is registered, packed and loaded while streams run on another engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio

from sidecar.proto import admin_pb2, admin_pb2_grpc
from tests.bench import clients
from tests.bench.figures import Figure, middle, percentile
from tests.bench.large import SMALL, THREE_HUNDRED_MB, PlainSender, engine_options
from tests.bench.processes import SidecarProcess, backend_of
from tests.emulated import EngineProcess

STREAMS, TOKENS, ROUNDS = 8, 200, 5
STALL_GOAL_MS, GAP_GOAL = 20.0, 1.5
HERE, THERE = "trt-0", "trt-1"
Work = Callable[[], Awaitable[None]]


class Stage:
    """Two engines in real time, a sidecar before both, and streams of a small adapter that run on the first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = iter(range(1000))

    async def __aenter__(self) -> Stage:
        self._stack = stack = AsyncExitStack()
        SMALL.write(self._folder / "served" / "small", 0)
        THREE_HUNDRED_MB.write(self._folder / "huge", 1)
        self.engines = [
            await stack.enter_async_context(EngineProcess(*engine_options(), time_scale=1.0)) for _ in (HERE, THERE)
        ]
        backends = [backend_of(engine, name) for engine, name in zip(self.engines, (HERE, THERE), strict=True)]
        adapters = {"serve": str(self._folder / "served"), "roots": [str(self._folder)]}
        self.sidecar = await stack.enter_async_context(SidecarProcess(self._folder, backends, adapters=adapters))
        admin = await stack.enter_async_context(grpc.aio.insecure_channel(self.sidecar.admin))
        self.adapters = admin_pb2_grpc.AdaptersStub(admin)
        await self.adapters.Prefetch(admin_pb2.PrefetchRequest(name="small", backends=[HERE]))
        channel = await stack.enter_async_context(clients.open_channel(self.sidecar.data))
        self._streams = [clients.open_stream(channel) for _ in range(STREAMS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.cancel()
        await self._stack.aclose()

    async def gaps_ms(self, work: Work) -> list[float]:
        """Return the token gaps of the streams while some work is done, which must end before they do."""
        message = clients.named_request("small", TOKENS)
        answers = asyncio.gather(*(clients.ask(stream, message) for stream in self._streams))
        await work()
        return [gap * 1e3 for timed in await answers for gap in timed.gaps_s]

    async def bring_in(self) -> None:
        """Register the adapter, pack it and load it onto the other engine, each time under a name of its own."""
        name = f"huge-{next(self._numbers)}"
        await self.adapters.Register(admin_pb2.RegisterRequest(name=name, path=str(self._folder / "huge")))
        places = await self.adapters.Prefetch(admin_pb2.PrefetchRequest(name=name, backends=[THERE]))
        print(places)
        await self.adapters.Evict(admin_pb2.AdapterRequest(name=name))
        await self.adapters.Unregister(admin_pb2.AdapterRequest(name=name))

    async def stall_ms(self) -> float:
        """Return the longest stall of the sidecar's event loop since this was last asked."""
        return (await self.sidecar.metrics())["event_loop_stall_seconds", ()] * 1e3


async def bench(folder: Path) -> list[Figure]:
    async with Stage(folder) as stage:
        idle, plain, busy, stalls, idle_stalls = [], [], [], [], []
        sender = PlainSender(stage.engines[1].grpc_address)
        for number in range(ROUNDS):
            await stage.stall_ms()
            idle.append(percentile(await stage.gaps_ms(_nothing), 0.99))
            idle_stalls.append(await stage.stall_ms())
            message = THREE_HUNDRED_MB.message(100 + number)
            plain.append(percentile(await stage.gaps_ms(lambda: _send(sender, message)), 0.99))
            del message
            await stage.stall_ms()
            busy.append(percentile(await stage.gaps_ms(stage.bring_in), 0.99))
            stalls.append(await stage.stall_ms())
        sender.close()
    print(idle, plain, busy, stalls, idle_stalls)
    return [
        Figure(
            "stall: longest, event loop", max(stalls), "ms", max(idle_stalls), "an idle sidecar", "value", STALL_GOAL_MS
        ),
        Figure("stall: p99 token gap", middle(busy), "ms", middle(idle), "an idle sidecar", "ratio", GAP_GOAL),
        Figure("stall: p99 gap, plain send", middle(plain), "ms", middle(idle), "an idle sidecar"),
    ]


async def _nothing() -> None:
    return None


async def _send(sender: PlainSender, message: bytes) -> None:
    await asyncio.to_thread(sender.send, [message])
