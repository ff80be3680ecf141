"""What one process carries: answers of four tokens at fixed rates, the process on one core and all else on the others.

A request counts from when it was due, so one that had to wait for the one before it on its stream counts in full.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil

from tests.bench import clients
from tests.bench.figures import Figure, middle, percentile
from tests.bench.processes import Measured, RelayProcess, SidecarProcess, backend_of
from tests.kit.emulated import EngineProcess
from tests.kit.serving import write_adapters

TOKENS, STREAMS = 4, 64
RATES, SECONDS, WARM_UP_S = (250, 500, 750, 1000), 6.0, 1.5
GOAL_MS = 10.0


async def bench(folder: Path) -> list[Figure]:
    names = write_adapters(folder / "adapters", 4)
    served = {"serve": str(folder / "adapters")}
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        engine = await enter(EngineProcess("--compute", "none", "--kv-blocks", "65536"))
        relay = await enter(RelayProcess(engine.grpc_address))
        sidecar = await enter(SidecarProcess(folder, [backend_of(engine)], adapters=served))
        stack.callback(_put, [os.getpid()], os.sched_getaffinity(0))
        _put_apart(relay, sidecar)
        places = {
            "direct": await _streams(stack, engine.grpc_address, [""]),
            "relay": await _streams(stack, relay.data, [""]),
            "sidecar": await _streams(stack, sidecar.data, names),
        }
        return [figure for rate in RATES for figure in await _at(rate, places, sidecar)]


async def _at(rate: int, places: dict[str, list[tuple[Any, bytes]]], sidecar: Measured) -> list[Figure]:
    times_ms, cores = {}, 0.0
    for place, streams in places.items():
        before_s, begun = sidecar.cpu_s(), perf_counter()
        parts = await asyncio.gather(*(_ask(turn, rate, *each) for turn, each in enumerate(streams)))
        cores = (sidecar.cpu_s() - before_s) / (perf_counter() - begun)  # the sidecar comes last
        times_ms[place] = [one_s * 1e3 for part in parts for one_s in part]
    direct, relay, own = (percentile(times_ms[place], 0.99) for place in ("direct", "relay", "sidecar"))
    note = f"p50 {middle(times_ms['sidecar']):.1f} ms, {cores:.2f} of a core; a bare relay's p99 {relay:.1f} ms"
    goal = GOAL_MS if rate == RATES[-1] else None
    return [
        Figure(f"rate: p99 at {rate:,} a second", own, "ms", direct, "the engine directly", "difference", goal, note)
    ]


async def _ask(turn: int, rate: int, stream: Any, message: bytes) -> list[float]:
    """Return the seconds that each request took, counted from when it was due; the first ones do not count."""
    seconds, begun = [], perf_counter()
    for number in range(turn, int(rate * SECONDS), STREAMS):
        due = begun + number / rate
        await asyncio.sleep(max(0.0, due - perf_counter()))
        await clients.ask(stream, message)
        if due - begun > WARM_UP_S:
            seconds.append(perf_counter() - due)
    return seconds


async def _streams(stack: AsyncExitStack, address: str, names: list[str]) -> list[tuple[Any, bytes]]:
    channel = await stack.enter_async_context(clients.open_channel(address))
    streams = [clients.open_stream(channel) for _ in range(STREAMS)]
    stack.callback(lambda: [stream.cancel() for stream in streams])
    return [
        (stream, clients.named_request(names[number % len(names)], TOKENS, f"r{number}"))
        for number, stream in enumerate(streams)
    ]


def _put_apart(*measured: Measured) -> None:
    """Give the processes that are measured a core, and this one and its other children the rest."""
    first, *rest = sorted(os.sched_getaffinity(0))
    ours = [process.pid for process in measured]
    family = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    _put(ours, [first])
    _put([pid for pid in family if pid not in ours], rest or [first])


def _put(pids: Sequence[int], cores: Collection[int]) -> None:
    for pid in pids:
        for thread in psutil.Process(pid).threads():
            os.sched_setaffinity(thread.id, cores)
