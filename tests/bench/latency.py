"""Latency that the sidecar adds to a streamed request of a resident adapter, for one client and 64 that take turns."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from tests.bench import clients
from tests.bench.figures import Figure, middle, percentile
from tests.bench.processes import RelayProcess, SidecarProcess, backend_of
from tests.kit.emulated import EngineProcess
from tests.kit.serving import write_adapters

REQUESTS, TOKENS, WARM_UP = 600, 4, 50
GOALS_MS = {"uvloop": 0.5, "asyncio": 1.0}
CLIENTS, EVERY_S, ROUNDS = 64, 0.32, 12
"""Each of the clients asks once in so many seconds, one after another: 200 requests a second in all."""


async def bench(folder: Path) -> list[Figure]:
    figures = []
    for loop, goal_ms in GOALS_MS.items():
        async with EngineProcess("--compute", "none") as engine:
            figures += await measure(folder, engine, loop, goal_ms)
    return figures


async def measure(folder: Path, engine: Any, loop: str, goal_ms: float) -> list[Figure]:
    """Return what a sidecar and a bare relay add to an engine's answers."""
    (name,) = write_adapters(folder / "adapters", 1)
    async with AsyncExitStack() as stack:
        relay = await stack.enter_async_context(RelayProcess(engine.grpc_address, loop == "uvloop"))
        served = {"serve": str(folder / "adapters")}
        sidecar = await stack.enter_async_context(
            SidecarProcess(folder, [backend_of(engine)], loop == "uvloop", adapters=served)
        )
        places = {
            "direct": (engine.grpc_address, clients.named_request("", TOKENS)),
            "relay": (relay.data, clients.named_request("", TOKENS)),
            "sidecar": (sidecar.data, clients.named_request(name, TOKENS)),
        }
        one = {place: (await _stream(stack, address), message) for place, (address, message) in places.items()}
        figures = _figures(await _interleaved(one), loop, goal_ms)
        many = {
            place: ([await _stream(stack, address) for _ in range(CLIENTS)], message)
            for place, (address, message) in places.items()
        }
        return figures + _figures(await _in_turns(many), f"{loop}, {CLIENTS} clients", None)


async def _stream(stack: AsyncExitStack, address: str) -> Any:
    channel = await stack.enter_async_context(clients.open_channel(address))
    stream = clients.open_stream(channel)
    stack.callback(stream.cancel)
    return stream


async def _interleaved(places: dict[str, tuple[Any, bytes]]) -> dict[str, list[clients.Timed]]:
    times: dict[str, list[clients.Timed]] = {place: [] for place in places}
    for number in range(REQUESTS + WARM_UP):
        for place, (stream, message) in places.items():
            timed = await clients.ask(stream, message)
            if number >= WARM_UP:
                times[place].append(timed)
    return times


async def _in_turns(places: dict[str, tuple[list[Any], bytes]]) -> dict[str, list[clients.Timed]]:
    times: dict[str, list[clients.Timed]] = {place: [] for place in places}
    for number in range(ROUNDS + 1):
        for place, (streams, message) in places.items():
            timed = await asyncio.gather(*(_after(turn, stream, message) for turn, stream in enumerate(streams)))
            times[place] += timed if number else []
    return times


async def _after(turn: int, stream: Any, message: bytes) -> clients.Timed:
    await asyncio.sleep(turn * EVERY_S / CLIENTS)
    return await clients.ask(stream, message)


def _figures(times: dict[str, list[clients.Timed]], loop: str, goal_ms: float | None) -> list[Figure]:
    first = {place: [timed.first_s * 1e3 for timed in of] for place, of in times.items()}
    whole = {place: [timed.whole_s * 1e3 for timed in of] for place, of in times.items()}
    figures = []
    for what, by in (("first token", first), (f"{TOKENS} tokens", whole)):
        direct, sidecar, relay = (middle(by[place]) for place in ("direct", "sidecar", "relay"))
        added, bare = sidecar - direct, relay - direct
        times = f"{added / bare:.1f} times what a bare relay adds ({bare:.2f} ms)"
        note = f"adds {added:.2f} ms, {times}; p99 {_p99(by):.2f} ms"
        reference = "the engine directly"
        figures.append(
            Figure(f"latency: p50 {what}, {loop}", sidecar, "ms", direct, reference, "difference", goal_ms, note)
        )
    return figures


def _p99(by: dict[str, list[float]]) -> float:
    return percentile(by["sidecar"], 0.99) - percentile(by["direct"], 0.99)
