"""Two emulated trtllm-serves under load: many adapters in few slots, killed engines, and the limit of one batch."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from sidecar.lab.engine.trtllm import TrtllmServer
from sidecar.proto import gateway_pb2
from tests.kit.emulated import EngineProcess
from tests.kit.serving import Serving, place_of, serving, until, write_adapters
from tests.kit.trtllm_emulated import TrtllmProcess, expected, running_trtllm
from tests.kit.trtllm_served import answer_of, entry_of, fronted
from tests.kit.vllm_emulated import VllmProcess

DEMO = Path(__file__).parents[2] / "sidecar/lab/demo/data"
SLOTS, ADAPTERS = 4, 64
AT_ONCE = 96
BEGUN = "an answer that has begun is never repeated"
SIZES: dict[str, Any] = {"max_loras": SLOTS, "max_cpu_loras": 2 * SLOTS}
PROCESS = ("--compute", "none", "--max-loras", str(SLOTS), "--max-cpu-loras", str(2 * SLOTS), "--iteration-stats")


def counted(engine: TrtllmServer) -> Callable[[], int]:
    """Return a function that tells the most adapters that the engine ever had in progress at once."""
    model, most = engine.engine._planner, 0
    plan = model.plan

    def watched(now_ns: int) -> Any:
        nonlocal most
        found = plan(now_ns)
        most = max(most, len({active.task_id for active in model._active() if active.task_id is not None}))
        return found

    model.plan = watched  # type: ignore[method-assign]
    return lambda: most


async def asked(served: Serving, folder: Path, names: list[str], requests: int, seed: int) -> list[str]:
    """Ask for adapters at random, so many at once; return what went wrong."""
    generator, gate, wrong = random.Random(seed), asyncio.Semaphore(AT_ONCE), []

    async def one(name: str, tokens: int) -> None:
        async with gate:
            try:
                answer = await served.ask(name, tokens)
            except grpc.aio.AioRpcError as error:
                wrong.append(f"{name}: {error.details()}")
                return
        right = answer_of(folder, name, tokens) if name else expected(None, tokens)
        if answer.tokens != right or len(answer.origins) != 1:
            wrong.append(f"{name}: {answer.tokens} and not {right}, {len(answer.origins)} endings")

    chosen = [(generator.choice([*names, ""]), generator.randint(1, 12)) for _ in range(requests)]
    await asyncio.gather(*(one(name, tokens) for name, tokens in chosen))
    return wrong


@pytest.mark.parametrize(
    "requests", [pytest.param(2000, marks=pytest.mark.slow), 150], ids=["2000 requests", "150 requests"]
)
async def test_many_adapters_share_few_slots_without_a_fault(tmp_path: Path, requests: int) -> None:
    """None fails, none is doubled, each is right, and no engine ever has more adapters in progress than slots."""
    names = write_adapters(tmp_path / "adapters", ADAPTERS)
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(running_trtllm(compute="none", seats=32, **SIZES)) for _ in range(2)]
        most = [counted(engine) for engine, _ in running]
        engines = [engine for engine, _ in running]
        served = await stack.enter_async_context(fronted(engines, tmp_path, backend=entry_of(tmp_path, **SIZES)))
        assert await asked(served, tmp_path, names, requests, seed=requests) == []
        assert all(0 < each() <= SLOTS for each in most), [each() for each in most]
        assert all(engine.died is None for engine in engines)


async def test_clients_that_leave_do_not_make_a_batch_too_large(tmp_path: Path) -> None:
    """The engine runs on for a while for a client that has left, so its adapter counts for as long."""
    names = write_adapters(tmp_path / "adapters", 8)
    options = {"compute": "none", "seats": 32, "time_scale": 1.0, "max_loras": 2, "max_cpu_loras": 4}
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(running_trtllm(**options)) for _ in range(2)]
        most = [counted(engine) for engine, _ in running]
        served = await stack.enter_async_context(fronted([engine for engine, _ in running], tmp_path))
        generator = random.Random(3)

        async def leaves(name: str, after_s: float) -> None:
            asking = asyncio.create_task(served.ask(name, 400))
            await asyncio.wait([asking], timeout=after_s)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

        async def client() -> None:
            for _ in range(8):
                await leaves(generator.choice(names), generator.random())

        await asyncio.gather(*(client() for _ in range(12)))
        assert all(0 < each() <= 2 for each in most), [each() for each in most]
        assert all(served.state.backends[f"trtllm-{number}"].facts.device_pages == 2 for number in (0, 1))


@pytest.mark.parametrize("requests", [300, pytest.param(800, marks=pytest.mark.slow)])
async def test_killed_engines_under_load_cost_no_request_that_has_no_token(tmp_path: Path, requests: int) -> None:
    names = write_adapters(tmp_path / "adapters", 16)
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(TrtllmProcess(*PROCESS)) for _ in range(2)]
        served = await stack.enter_async_context(fronted(engines, tmp_path, backend=entry_of(tmp_path, **SIZES)))
        asking = asyncio.create_task(asked(served, tmp_path, names, requests, seed=1))
        for engine in engines:
            await until(lambda: asking.done() or sum(len(b.running) for b in served.state.backends.values()) > 8)
            await engine.kill()
            await engine.start()
            await until(lambda: all(b.takes_requests for b in served.state.backends.values()))
        for fault in await asking:
            assert BEGUN in fault


@pytest.mark.slow
async def test_a_pool_of_three_kinds_under_chaos(tmp_path: Path) -> None:
    """One name, one digest, equal answers. Each engine is killed once: what fails had tokens, and nothing is wrong."""
    known = json.loads((DEMO / "demo.json").read_text())
    names = sorted(set(known["answers"]) - {"base"})
    seed = ("--seed", str(known["seed"]))
    async with AsyncExitStack() as stack:
        triton = await stack.enter_async_context(EngineProcess(*seed))
        vllm = await stack.enter_async_context(VllmProcess(*seed, "--max-loras", "2", "--max-cpu-loras", "4"))
        trtllm = await stack.enter_async_context(
            TrtllmProcess(*seed, "--max-loras", "2", "--max-cpu-loras", "4", "--iteration-stats")
        )
        entry, shared = entry_of(tmp_path), {"adapters_dir": str(tmp_path / "shared")}
        base = {"base_model": entry["base_model"]}
        entries = [place_of(triton, 0) | base, place_of(vllm, 1) | base | shared, place_of(trtllm, 2) | entry]
        served = await stack.enter_async_context(
            serving([], DEMO / "adapters", backends=[each | {"progress_timeout_s": 20.0} for each in entries])
        )
        generator, gate = random.Random(7), asyncio.Semaphore(24)
        wrong: list[str] = []
        by: Counter[str] = Counter()

        async def one(name: str, number: int) -> None:
            async with gate:
                request = gateway_pb2.GenerateRequest(
                    adapter=name, text=known["prompts"][number], max_tokens=known["max_tokens"]
                )
                text, backends = "", []
                try:
                    async for response in served.gateway.Generate(request):
                        text += response.text
                        if response.HasField("origin"):
                            backends.append(response.origin.backend)
                except grpc.aio.AioRpcError as error:
                    if BEGUN not in (error.details() or ""):
                        wrong.append(f"{name}: {error.details()}")
                    return
            by.update(backends)
            right = known["answers"][name or "base"][number]["text"]
            if text != right or len(backends) != 1:
                wrong.append(f"{name}: {text!r} and not {right!r}, by {backends}")

        chosen = [(generator.choice([*names, ""]), generator.randrange(len(known["prompts"]))) for _ in range(240)]
        asking = [asyncio.create_task(one(*each)) for each in chosen]
        for engine in (triton, vllm, trtllm):
            await until(lambda: any(b.running for b in served.state.backends.values()) or all(t.done() for t in asking))
            await engine.kill()
            # A request may lose one engine and not two, and a quick restart may be noticed after the next kill only.
            await until(lambda: not all(b.takes_requests for b in served.state.backends.values()))
            await engine.start()
            await until(lambda: all(b.takes_requests for b in served.state.backends.values()))
            await until(lambda: not any(request.losses for request in served.state.requests.values()))
        await asyncio.gather(*asking)
        assert wrong == []
        for name in names:  # each kind by itself, of the same version
            for number in range(2):
                await one(name, number)
        assert wrong == []
        assert {backend for backend, count in by.items() if count} == set(served.state.backends)
