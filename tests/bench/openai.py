"""The OpenAI API: CPU time of one event and of one request, and the latency that is added, beside a bare relay's.

The bare relay is aiohttp on both sides, in front of an emulated vLLM, in the same run and in turns with the sidecar.
The engine takes its time for a token, so that each event comes by itself, as from a GPU; for latency it answers at
once.

A router in Rust stands beside them where one is installed: `pip install vllm-router`, or its path in VLLM_ROUTER.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import httpx

from tests.bench.figures import Figure, middle, percentile
from tests.bench.processes import Measured, SidecarProcess
from tests.kit.ports import free_port
from tests.kit.serving import write_adapters
from tests.kit.vllm_emulated import BASE, VllmProcess

STREAMS, ROUNDS = 16, 5
LONG, SHORT = 256, 4
"""Events of an answer: what the request around them costs must not show."""
REQUESTS = 320
"""In a round: in a row, of one token each, for latency and for what a request costs; or short streams, at once."""
LABEL = "bare aiohttp relay"
ADAPTER = 2
"""The number of the subject that the goals are for."""
EVENT_GOAL, PACED_GOAL, BURST_GOAL = 1.7, 3.0, 4.0


class BareRelay(Measured):
    """The reference process."""

    def __init__(self, engine: str) -> None:
        super().__init__("-m", "tests.bench.bare_openai", engine)

    @property
    def http(self) -> str:
        return str(self.ready["http"])


class RustRouter(Measured):
    """A router in Rust that passes requests on to one engine and knows nothing of adapters."""

    def __init__(self, program: str, engine: str) -> None:
        self.http = f"127.0.0.1:{free_port()}"
        arguments = ("--host", "127.0.0.1", "--port", self.http.rpartition(":")[2], "--policy", "round_robin")
        quiet = ("--log-level", "error", "--prometheus-port", str(free_port()))
        super().__init__(*arguments, *quiet, "--worker-urls", f"http://{engine}", program=program)

    async def _become_ready(self, process: asyncio.subprocess.Process) -> None:
        async with asyncio.timeout(60), httpx.AsyncClient(trust_env=False) as client:
            while True:
                try:
                    if (await client.get(f"http://{self.http}/health")).status_code == 200:
                        return
                except httpx.TransportError:
                    if process.returncode is not None:
                        raise RuntimeError(f"{self._program} did not start: {self.errors()}") from None
                await asyncio.sleep(0.1)


def rust_router() -> str | None:
    """Return the program of a router in Rust, if there is one."""
    return os.environ.get("VLLM_ROUTER") or shutil.which("vllm-router")


@dataclass(frozen=True)
class Subject:
    """A process, a client of it, and what it calls the model."""

    process: Measured
    client: httpx.AsyncClient
    model: str

    async def event_us(self) -> float:
        """Return the process's CPU microseconds an event, with many streams at once."""
        before_s = self.process.cpu_s()
        events = sum(await asyncio.gather(*(self._stream(LONG) for _ in range(STREAMS))))
        return (self.process.cpu_s() - before_s) / events * 1e6

    async def short_us(self) -> float:
        """Return the process's CPU microseconds a streamed completion of `SHORT` tokens, with many at once."""
        before_s = self.process.cpu_s()
        await asyncio.gather(*(self._streams(REQUESTS // STREAMS) for _ in range(STREAMS)))
        return (self.process.cpu_s() - before_s) / (REQUESTS // STREAMS * STREAMS) * 1e6

    async def _streams(self, times: int) -> None:
        for _ in range(times):
            await self._stream(SHORT)

    async def _stream(self, tokens: int) -> int:
        events = 0
        async with self.client.stream("POST", "/v1/completions", json=self._body(tokens, stream=True)) as response:
            response.raise_for_status()
            async for piece in response.aiter_raw():
                events += piece.count(b"\n\n")
        return events

    async def requests(self) -> tuple[float, list[float]]:
        """Return CPU microseconds a request, and the seconds that each took, one after another."""
        before_s, seconds = self.process.cpu_s(), []
        for _ in range(REQUESTS):
            began = perf_counter()
            (await self.client.post("/v1/completions", json=self._body(1))).raise_for_status()
            seconds.append(perf_counter() - began)
        return (self.process.cpu_s() - before_s) / REQUESTS * 1e6, seconds

    def _body(self, tokens: int, stream: bool = False) -> dict[str, object]:
        return {"model": self.model, "prompt": "hello", "max_tokens": tokens, "stream": stream}


async def bench(folder: Path) -> list[Figure]:
    write_adapters(folder / "adapters", 1)
    (folder / "shared").mkdir()
    figures = await with_engine(folder, 1.0, compare_events)
    return figures + await with_engine(folder, 0.0, compare_requests)


async def with_engine(
    folder: Path, time_scale: float, compare: Callable[[Sequence[Subject]], Awaitable[list[Figure]]]
) -> list[Figure]:
    """Compare a bare relay, the sidecar with the base model and with an adapter, and a router if there is one."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        engine = await enter(VllmProcess("--compute", "none", "--served-model-name", BASE, time_scale=time_scale))
        relay = await enter(BareRelay(engine.http_address))
        backend = {"url": f"vllm://{engine.http_address}", "id": "vllm-0", "adapters_dir": str(folder / "shared")}
        served = {"serve": str(folder / "adapters")}
        sidecar = await enter(SidecarProcess(folder, [backend], adapters=served))
        subjects = []
        compared = [(relay, relay.http, BASE), (sidecar, sidecar.http, BASE), (sidecar, sidecar.http, "a00")]
        program = rust_router()
        if program is not None:
            router = await enter(RustRouter(program, engine.http_address))
            compared.append((router, router.http, BASE))
        for process, address, model in compared:
            client = await enter(httpx.AsyncClient(base_url=f"http://{address}", timeout=120, trust_env=False))
            subjects.append(Subject(process, client, model))
        return await compare(subjects)


async def compare_events(subjects: Sequence[Subject]) -> list[Figure]:
    rounds = [[await subject.event_us() for subject in subjects] for _ in range(ROUNDS + 1)]
    shorts = [[await subject.short_us() for subject in subjects] for _ in range(ROUNDS + 1)]
    paced = f"streamed completion of {SHORT} tokens, paced"
    return [*_costs("event", "µs/event", rounds, EVENT_GOAL), *_costs(paced, "µs/request", shorts, PACED_GOAL)]


async def compare_requests(subjects: Sequence[Subject]) -> list[Figure]:
    shorts = [[await subject.short_us() for subject in subjects] for _ in range(ROUNDS + 1)]
    rounds = [[await subject.requests() for subject in subjects] for _ in range(ROUNDS + 1)]
    times = [[s * 1e3 for _, seconds in one for s in seconds] for one in zip(*rounds[1:], strict=True)]
    p50, p99 = ([percentile(one, share) for one in times] for share in (0.5, 0.99))
    return [
        *_costs(f"streamed completion of {SHORT} tokens, in a burst", "µs/request", shorts, BURST_GOAL),
        *_costs("request", "µs/request", [[cost for cost, _ in one] for one in rounds]),
        *(
            Figure(
                f"openai: p50 of a request, {name}", p50[at], "ms", p50[0], LABEL,
                note=f"{p50[at] - p50[0]:+.2f} ms; p99 {p99[at]:.2f} : {p99[0]:.2f} ms",
            )
            for at, name in _others(subjects)
        ),
    ]  # fmt: skip


def _costs(what: str, unit: str, rounds: Sequence[Sequence[float]], goal: float | None = None) -> list[Figure]:
    """Return each subject's median cost but the first's, beside the first's; the first round warms up."""
    costs = [middle(one) for one in zip(*rounds[1:], strict=True)]
    return [
        Figure(f"openai: {what}, {name}", costs[at], unit, costs[0], LABEL, "ratio", goal if at == ADAPTER else None)
        for at, name in _others(costs)
    ]


def _others(subjects: Sequence[object]) -> list[tuple[int, str]]:
    """Return the number and the name of each subject but the first, of which the router may be missing."""
    return list(enumerate(("base model", "adapter", "a router in Rust")[: len(subjects) - 1], 1))
