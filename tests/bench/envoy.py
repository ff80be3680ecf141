"""What the Envoy lane costs beside Envoy alone and the path through the sidecar: `make bench-envoy`.

One engine that costs next to nothing paces the events; lanes take turns. CPU is that of Envoy's and the sidecar's
processes, divided by the answers, without what each spends while nothing is asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else each process that ends is told of between the lines

from tests.bench.figures import Figure, middle, percentile, run_alone
from tests.bench.processes import Measured, SidecarProcess, cpu_s
from tests.e2e.envoy.server import EnvoyServer
from tests.e2e.envoy.variants import plain
from tests.kit.quick_client import QuickClient
from tests.kit.quick_engine import Order, answer_of
from tests.kit.serving import write_adapters
from tests.kit.trtllm_emulated import BASE_CONFIG

STREAMS, ROUNDS, GAP_MS = 64, 3, 10.0
SHORT = 16
"""Events of the answer to which the growth of the sidecar's part is compared."""
WAVES = {4: 64, 16: 16, 64: 4, 256: 2, 1024: 1}
"""How often all streams ask for an answer of so many events in a round."""
REQUESTS = 400
"""Of each lane, one after another, for the first byte."""
IDLE_S = 4.0
DUPLEX = "FULL_DUPLEX_STREAMED"
LANES = {"duplex-streamed": "STREAMED", "duplex-duplex": DUPLEX}
OURS_GOAL_MS, GROWTH_GOAL, RATIO_GOAL, FIRST_GOAL_MS = 4.0, 1.3, 1.5, 3.0


@dataclass(frozen=True)
class Spent:
    """CPU milliseconds of an answer."""

    envoy: float
    sidecar: float


@dataclass
class Lane:
    """A way to the engine; without Envoy or without a sidecar that part costs nothing."""

    address: str
    model: str
    envoy: int | None
    sidecar: int | None
    idle: tuple[float, float] = (0.0, 0.0)
    """CPU seconds a second that Envoy and the sidecar take while nobody asks."""

    def spent_s(self) -> tuple[float, float]:
        envoy, sidecar = (cpu_s(pid) if pid is not None else 0.0 for pid in (self.envoy, self.sidecar))
        return envoy, sidecar

    async def rest(self) -> None:
        """Find what is spent while nobody asks."""
        before, began_s = self.spent_s(), perf_counter()
        await asyncio.sleep(IDLE_S)
        took_s = perf_counter() - began_s
        envoy, sidecar = ((after - was) / took_s for after, was in zip(self.spent_s(), before, strict=True))
        self.idle = envoy, sidecar

    async def cost(self, events: int, waves: int) -> Spent:
        """Have all streams ask so many times for an answer; return what one costs."""
        order = Order(events, gap_ms=GAP_MS)
        expected = len(answer_of(order))
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(QuickClient(self.address)) for _ in range(STREAMS)]
            before, began_s = self.spent_s(), perf_counter()
            for _ in range(waves):
                answers = await asyncio.gather(*(client.stream(self.model, order.prompt, events) for client in clients))
                for answer in answers:
                    if answer.status != 200 or len(answer.body) != expected:
                        raise RuntimeError(
                            f"{answer.status}, {len(answer.body)} bytes of {expected}: {answer.body[:500]!r}"
                        )
            await asyncio.sleep(0.2)  # the access log is flushed
            took_s = perf_counter() - began_s
            envoy, sidecar = (
                (after - was - idle * took_s) / (waves * STREAMS) * 1e3
                for after, was, idle in zip(self.spent_s(), before, self.idle, strict=True)
            )
        return Spent(envoy, sidecar)

    async def first_ms(self, client: QuickClient) -> float:
        answer = await client.stream(self.model, Order(4).prompt, 4)
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {answer.body!r}")
        return answer.first_s * 1e3


async def bench(folder: Path) -> list[Figure]:
    write_adapters(folder / "adapters", 1)
    (folder / "shared").mkdir()
    async with AsyncExitStack() as stack:
        lanes = await _lanes(stack, folder)
        for lane in lanes.values():
            await lane.cost(16, 1)
            await lane.rest()
        spent: dict[tuple[str, int], list[Spent]] = {(name, events): [] for name in lanes for events in WAVES}
        for number in range(ROUNDS):
            print(f"round {number + 1} of {ROUNDS} …", file=sys.stderr)
            for events, waves in WAVES.items():
                for name, lane in lanes.items():
                    spent[name, events].append(await lane.cost(events, waves))
        print("first bytes …", file=sys.stderr)
        first = await _first(stack, lanes)
    middles = {
        key: Spent(middle([each.envoy for each in found]), middle([each.sidecar for each in found]))
        for key, found in spent.items()
    }
    return [*_costs(middles, lanes["duplex-streamed"]), *_others(middles), _pays(middles), *_first_figures(first)]


async def _lanes(stack: AsyncExitStack, folder: Path) -> dict[str, Lane]:
    enter = stack.enter_async_context
    engine = await enter(Measured("-m", "tests.kit.quick_engine"))
    address, base = str(engine.ready["http"]), folder / "base.json"
    base.write_text(json.dumps(BASE_CONFIG))
    backend = {
        "url": f"vllm://{address}",
        "id": "vllm-0",
        "adapters_dir": str(folder / "shared"),
        "engine": {"seats": 4 * STREAMS},
        "base_model": {"name": "tiny-llama", "config": str(base)},
    }
    served = {"serve": str(folder / "adapters")}
    sidecar = await enter(SidecarProcess(folder, [backend], picks=True, adapters=served))
    alone = await enter(EnvoyServer(folder / "plain", "127.0.0.1:1", changed=plain([address])))
    lanes = {"plain Envoy": Lane(alone.address, "base", alone.pid, None)}
    for name, mode in LANES.items():
        envoy = await enter(EnvoyServer(folder / name, sidecar.endpoint_picker, DUPLEX, mode))
        lanes[name] = Lane(envoy.address, "a00", envoy.pid, sidecar.pid)
    lanes["in path"] = Lane(sidecar.http, "a00", None, sidecar.pid)
    return lanes


async def _first(stack: AsyncExitStack, lanes: dict[str, Lane]) -> dict[str, list[float]]:
    clients = {name: await stack.enter_async_context(QuickClient(lane.address)) for name, lane in lanes.items()}
    times: dict[str, list[float]] = {name: [] for name in lanes}
    for _ in range(REQUESTS):
        for name, lane in lanes.items():
            times[name].append(await lane.first_ms(clients[name]))
    return {name: found[REQUESTS // 10 :] for name, found in times.items()}


def _costs(spent: dict[tuple[str, int], Spent], lane: Lane) -> list[Figure]:
    name = "duplex-streamed"
    figures = [
        Figure(
            f"envoy: ours of an answer, {events} events", spent[name, events].sidecar, "ms of CPU",
            goal=OURS_GOAL_MS, note="" if events > 16 else f"without {lane.idle[1] * 1e3:.1f} ms a second at rest",
        )
        for events in WAVES
    ]  # fmt: skip
    first, last = SHORT, max(WAVES)
    figures.append(
        Figure(
            f"envoy: ours, {last} events", spent[name, last].sidecar, "ms of CPU", spent[name, first].sidecar,
            f"{first} events", "ratio", GROWTH_GOAL,
        )
    )  # fmt: skip
    for events in WAVES:
        ours, alone = spent[name, events], spent["plain Envoy", events].envoy
        figures.append(
            Figure(
                f"envoy: Envoy and ours, {events} events", ours.envoy + ours.sidecar, "ms of CPU", alone,
                "plain Envoy", "ratio", RATIO_GOAL if events >= 256 else None, f"Envoy's part {ours.envoy:.2f} ms",
            )
        )  # fmt: skip
    return figures


def _others(spent: dict[tuple[str, int], Spent]) -> list[Figure]:
    figures = []
    for name in ("duplex-duplex", "in path"):
        for events in WAVES:
            cost, alone = spent[name, events], spent["plain Envoy", events].envoy
            parts = f"ours {cost.sidecar:.2f} ms, Envoy's {cost.envoy:.2f} ms" if cost.envoy else ""
            whole = cost.envoy + cost.sidecar
            figures.append(
                Figure(f"envoy: {name}, {events} events", whole, "ms of CPU", alone, "plain Envoy", note=parts)
            )
    return figures


def _pays(spent: dict[tuple[str, int], Spent]) -> Figure:
    """Return from how many events on an answer costs less by the lane, by lines between those that were measured."""

    def more(events: int) -> float:
        lane, in_path = spent["duplex-streamed", events], spent["in path", events].sidecar
        return lane.envoy + lane.sidecar - in_path

    name, found = "envoy: the lane costs less than in path from", 0.0 if more(min(WAVES)) <= 0 else float("inf")
    for fewer, events in pairwise(WAVES):
        if more(fewer) > 0 >= more(events):
            found = fewer + (events - fewer) * more(fewer) / (more(fewer) - more(events))
            break
    return Figure(name, found, "events")


def _first_figures(times: dict[str, Sequence[float]] | dict[str, list[float]]) -> list[Figure]:
    alone = times["plain Envoy"]
    return [
        Figure(
            f"envoy: first byte p50, {name}", middle(found), "ms", middle(alone), "plain Envoy", "difference",
            FIRST_GOAL_MS if name == "duplex-streamed" else None,
            f"adds {middle(found) - middle(alone):.2f} ms; p99 {percentile(found, 0.99):.2f} : "
            f"{percentile(alone, 0.99):.2f} ms",
        )
        for name, found in times.items()
        if name != "plain Envoy"
    ]  # fmt: skip


if __name__ == "__main__":
    run_alone("tests.bench.envoy", __doc__, bench)
