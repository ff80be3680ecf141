"""The OpenAI API: CPU time of one event and of one request, and the latency that is added, beside a bare relay's.

The bare relay is aiohttp on both sides, in front of an emulated vLLM, in the same run and in turns with the sidecar.
The engine takes its time for a token, so that each event comes by itself, as from a GPU; for latency it answers at
once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import httpx

from tests.bench.figures import Figure, middle, percentile
from tests.bench.processes import Measured, SidecarProcess
from tests.kit.serving import write_adapters
from tests.kit.vllm_emulated import BASE, VllmProcess

STREAMS, ROUNDS = 16, 5
LONG, SHORT = 256, 4
"""Events of an answer: what the request around them costs must not show."""
REQUESTS = 320
"""In a round: in a row, of one token each, for latency and for what a request costs; or short streams, at once."""
LABEL = "bare aiohttp relay"


class BareRelay(Measured):
    """The reference process."""

    def __init__(self, engine: str) -> None:
        super().__init__("-m", "tests.bench.bare_openai", engine)

    @property
    def http(self) -> str:
        return str(self.ready["http"])


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
    """Compare a bare relay, the sidecar with the base model, and the sidecar with an adapter."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        engine = await enter(VllmProcess("--compute", "none", "--served-model-name", BASE, time_scale=time_scale))
        relay = await enter(BareRelay(engine.http_address))
        backend = {"url": f"vllm://{engine.http_address}", "id": "vllm-0", "adapters_dir": str(folder / "shared")}
        served = {"serve": str(folder / "adapters")}
        sidecar = await enter(SidecarProcess(folder, [backend], adapters=served))
        subjects = []
        for process, address, model in (
            (relay, relay.http, BASE),
            (sidecar, sidecar.http, BASE),
            (sidecar, sidecar.http, "a00"),
        ):
            client = await enter(httpx.AsyncClient(base_url=f"http://{address}", timeout=120, trust_env=False))
            subjects.append(Subject(process, client, model))
        return await compare(subjects)


async def compare_events(subjects: Sequence[Subject]) -> list[Figure]:
    rounds = [[await subject.event_us() for subject in subjects] for _ in range(ROUNDS + 1)]
    bare, base, adapter = (middle(costs) for costs in zip(*rounds[1:], strict=True))
    return [
        Figure("openai: event, base model", base, "µs/event", bare, LABEL),
        Figure("openai: event, adapter", adapter, "µs/event", bare, LABEL),
    ]


async def compare_requests(subjects: Sequence[Subject]) -> list[Figure]:
    shorts = [[await subject.short_us() for subject in subjects] for _ in range(ROUNDS + 1)]
    bare, base, adapter = (middle(one) for one in zip(*shorts[1:], strict=True))
    rounds = [[await subject.requests() for subject in subjects] for _ in range(ROUNDS + 1)]
    costs = [middle([cost for cost, _ in one]) for one in zip(*rounds[1:], strict=True)]
    times = [[s * 1e3 for _, seconds in one for s in seconds] for one in zip(*rounds[1:], strict=True)]
    p50, p99 = ([percentile(one, share) for one in times] for share in (0.5, 0.99))
    return [
        Figure(
            f"openai: streamed completion of {SHORT} tokens, adapter", adapter, "µs/request", bare, LABEL,
            note=f"base model: {base:.0f} µs",
        ),
        Figure(
            "openai: request, adapter", costs[2], "µs/request", costs[0], LABEL, note=f"base model: {costs[1]:.0f} µs"
        ),
        Figure(
            "openai: p50 of a request, adapter", p50[2], "ms", p50[0], LABEL,
            note=f"{p50[2] - p50[0]:+.2f} ms; base model {p50[1] - p50[0]:+.2f} ms; p99 {p99[2]:.2f} : {p99[0]:.2f} ms",
        ),
    ]  # fmt: skip
