"""What others feel of a 300 MB adapter: it is registered, packed and loaded while streams run on another engine."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import grpc.aio

from sidecar.proto import admin_pb2, admin_pb2_grpc
from tests.bench import clients
from tests.bench.figures import Figure, middle, percentile
from tests.bench.large import SMALL, THREE_HUNDRED_MB, engine_options, send_once
from tests.bench.processes import SidecarProcess, backend_of
from tests.kit.emulated import EngineProcess

STREAMS, TOKENS, ROUNDS, IDLE_S = 8, 100, 5, 3.0
STALL_GOAL_MS, GAP_GOAL = 20.0, 1.5
HERE, THERE = "trt-0", "trt-1"
RESIDENT = ("gpu", "engine_host")
Work = Callable[[], Awaitable[Any]]


async def bench(folder: Path) -> list[Figure]:
    gaps: dict[str, list[float]] = {"idle": [], "plain": [], "busy": []}
    stalls: dict[str, list[float]] = {"idle": [], "plain": [], "busy": []}
    async with Stage(folder) as stage:
        works: dict[str, Work] = {"idle": _nothing, "plain": stage.send_plainly, "busy": stage.bring_in}
        for _ in range(ROUNDS):
            for kind, work in works.items():
                await stage.stall_ms()
                gaps[kind].append(percentile(await stage.gaps_ms(work), 0.99))
                stalls[kind].append(await stage.stall_ms())
    size = f"{THREE_HUNDRED_MB.size_bytes / 1e6:.0f} MB"
    idle_ms = middle(gaps["idle"])
    note = f"{middle(gaps['plain']) / idle_ms:.2f}× while another process sends {size} to that engine"
    idle = "an idle sidecar"
    return [
        Figure(
            f"stall: longest, {size} brought in", max(stalls["busy"]), "ms", max(stalls["idle"]), idle, "value",
            STALL_GOAL_MS, f"the median of {ROUNDS} rounds is {middle(stalls['busy']):.1f} ms",
        ),
        Figure("stall: p99 token gap of others", middle(gaps["busy"]), "ms", idle_ms, idle, "ratio", GAP_GOAL, note),
    ]  # fmt: skip


class Stage:
    """Two engines in real time, a sidecar before both, and streams of a small adapter that run on the first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rounds = 0
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        enter = self._stack.enter_async_context
        SMALL.write(self._folder / "served" / "small", 0)
        THREE_HUNDRED_MB.write(self._folder / "huge", 1)
        engines = [await enter(EngineProcess(*engine_options(), time_scale=1.0)) for _ in (HERE, THERE)]
        backends = [backend_of(engine, name) for engine, name in zip(engines, (HERE, THERE), strict=True)]
        adapters = {"serve": str(self._folder / "served"), "roots": [str(self._folder)]}
        self._sidecar = await enter(SidecarProcess(self._folder, backends, adapters=adapters))
        self._adapters = admin_pb2_grpc.AdaptersStub(await enter(grpc.aio.insecure_channel(self._sidecar.admin)))
        await self._load("small", HERE)
        channel = await enter(clients.open_channel(self._sidecar.data))
        self._streams = [clients.open_stream(channel) for _ in range(STREAMS)]
        self._engine = engines[1].grpc_address
        self._sender = ProcessPoolExecutor(1, get_context("spawn"))  # gRPC does not live through a fork
        self._stack.callback(self._sender.shutdown)
        return self

    async def __aexit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.cancel()
        await self._stack.aclose()

    async def gaps_ms(self, work: Work) -> list[float]:
        """Return the gaps between tokens, of every stream, while some work is done."""
        ended = asyncio.Event()
        gaps = asyncio.gather(*(self._gaps_ms(stream, ended) for stream in self._streams))
        await work()
        ended.set()
        return [gap for of_stream in await gaps for gap in of_stream]

    async def _gaps_ms(self, stream: Any, ended: asyncio.Event) -> list[float]:
        message = clients.named_request("small", TOKENS)
        gaps: list[float] = []
        while not ended.is_set():
            gaps += [gap_s * 1e3 for gap_s in (await clients.ask(stream, message)).gaps_s]
        return gaps

    async def bring_in(self) -> None:
        """Register the adapter, pack it and load it onto the other engine, each time as another version."""
        name = self._copy()
        await self._adapters.Register(admin_pb2.RegisterRequest(name=name, path=str(self._folder / name)))
        await self._load(name, THERE)
        await self._adapters.Unregister(admin_pb2.AdapterRequest(name=name))

    def _copy(self) -> str:
        """Make a version of the adapter that differs in its alpha alone, so that its bytes need no copy."""
        self._rounds += 1
        name = f"huge-{self._rounds}"
        (self._folder / name).mkdir()
        original = self._folder / "huge"
        weights, config = "adapter_model.safetensors", "adapter_config.json"
        os.link(original / weights, self._folder / name / weights)
        record = json.loads((original / config).read_text()) | {"lora_alpha": 16 + self._rounds}
        (self._folder / name / config).write_text(json.dumps(record))
        return name

    async def _load(self, name: str, backend: str) -> None:
        await self._adapters.Prefetch(admin_pb2.PrefetchRequest(name=name, backends=[backend]))
        while True:
            adapter = await self._adapters.Get(admin_pb2.AdapterRequest(name=name))
            if any(place.backend == backend and place.tier in RESIDENT for place in adapter.backends):
                return
            await asyncio.sleep(0.05)

    async def send_plainly(self) -> None:
        """Send the same bytes to that engine past the sidecar, from a process of their own."""
        task_id = 1_000_000 + self._rounds
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._sender, send_once, self._engine, THREE_HUNDRED_MB, task_id)

    async def stall_ms(self) -> float:
        """Return the longest stall of the sidecar's event loop since this was last asked."""
        return (await self._sidecar.metrics())["event_loop_stall_seconds", ()] * 1e3


async def _nothing() -> None:
    await asyncio.sleep(IDLE_S)
