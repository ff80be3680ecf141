"""A 40 MB adapter on its way to an engine: a miss there with a store hit, and a cold miss by phase.

The engine's cache holds one such adapter and two adapters take turns, so each request finds the other one there.
"""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import AsyncExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import grpc.aio
import numpy as np

from sidecar.proto import admin_pb2, admin_pb2_grpc
from tests.bench import clients
from tests.bench.figures import Figure, middle
from tests.bench.large import FORTY_MB, PlainSender, engine_options
from tests.bench.processes import SidecarProcess, backend_of
from tests.kit.emulated import EngineProcess
from tests.kit.peft_files import read_tensors

NAMES = ("first", "second")
ROUNDS, WARM_UP = 9, 2
GOAL = 1.2
PHASES = ("fetch", "pack", "load")


async def bench(folder: Path) -> list[Figure]:
    for seed, name in enumerate(NAMES):
        FORTY_MB.write(folder / "adapters" / name, seed)
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(EngineProcess(*engine_options(host_pages=1)))
        backend = backend_of(engine, engine={"host_pages": 1})
        served = {"serve": str(folder / "adapters")}
        sidecar = await stack.enter_async_context(SidecarProcess(folder, [backend], adapters=served))
        channel = await stack.enter_async_context(clients.open_channel(sidecar.data))
        stream = clients.open_stream(channel)
        stack.callback(stream.cancel)
        missed, plain = await _misses(engine.grpc_address, stream)
        phases, cold = await _cold(sidecar, stream)
    floors = _floors(folder / "adapters" / NAMES[0], middle(plain))
    return [_miss_figure(missed, plain), *_cold_figures(phases, cold, floors)]


async def _misses(engine: str, stream: Any) -> tuple[list[float], list[float]]:
    """Return milliseconds of requests that had to load, and of plain sends between them."""
    messages = [FORTY_MB.message(task_id) for task_id in (11, 12)]
    sender = PlainSender(engine)
    missed, plain = [], []
    for _ in range(ROUNDS + WARM_UP):
        for turn, name in enumerate(NAMES):
            timed = await clients.ask(stream, clients.named_request(name, 1))
            missed.append(timed.whole_s * 1e3)
            plain.append(await asyncio.to_thread(sender.send, [messages[turn]]) * 1e3)
    sender.close()
    skipped = WARM_UP * len(NAMES)
    return missed[skipped:], plain[skipped:]


async def _cold(sidecar: SidecarProcess, stream: Any) -> tuple[dict[str, float], float]:
    """Return the mean milliseconds of each phase, and the median of a whole request, over cold misses."""
    before = await sidecar.metrics()
    times = []
    async with grpc.aio.insecure_channel(sidecar.admin) as channel:
        adapters = admin_pb2_grpc.AdaptersStub(channel)
        for number in range(ROUNDS):
            name = NAMES[number % len(NAMES)]
            await adapters.Evict(admin_pb2.AdapterRequest(name=name))
            timed = await clients.ask(stream, clients.named_request(name, 1))
            times.append(timed.whole_s * 1e3)
    after = await sidecar.metrics()
    return {phase: _mean_ms(before, after, phase) for phase in PHASES}, middle(times)


def _mean_ms(before: dict[Any, float], after: dict[Any, float], phase: str) -> float:
    total, count = (
        after.get(key, 0) - before.get(key, 0)
        for key in ((f"load_seconds_{end}", (phase,)) for end in ("sum", "count"))
    )
    return total / count * 1e3 if count else 0.0


def _floors(adapter: Path, send_ms: float) -> dict[str, tuple[float, str]]:
    """Return what packing and loading take at least on this machine, by one core."""
    tensors = read_tensors(adapter).values()
    began = perf_counter()
    hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).digest()
    for tensor in tensors:
        tensor.astype(np.float16)
    packed = perf_counter()
    return {
        "pack": ((packed - began) * 1e3, "read, SHA-256 and bf16 → fp16 by astype, the scale left out"),
        "load": (send_ms, "plain send of the same bytes"),
    }


def _miss_figure(missed: list[float], plain: list[float]) -> Figure:
    name = f"miss: store hit, {FORTY_MB.size_bytes / 1e6:.0f} MB"
    return Figure(name, middle(missed), "ms", middle(plain), "plain send of the same bytes", "ratio", GOAL)


def _cold_figures(phases: dict[str, float], cold: float, floors: dict[str, tuple[float, str]]) -> list[Figure]:
    figures = [Figure(f"cold miss: {phase}", phases[phase], "ms", *floors.get(phase, ())) for phase in PHASES]
    return [*figures, Figure("cold miss: whole request", cold, "ms")]
