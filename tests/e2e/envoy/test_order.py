"""The order of requests in the lane is as good as in path, though their ends are told late: one trace through both.

Engines are emulated and take a GPU's time for a step. What an order is worth shows in the tokens of a step: a seat that
stands empty, or a slot whose adapter has nothing to do, costs some.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.bench.processes import SidecarProcess
from tests.e2e.envoy.server import EnvoyServer
from tests.e2e.envoy.variants import Change
from tests.kit.quick_client import QuickClient
from tests.kit.serving import write_adapters
from tests.kit.trtllm_emulated import BASE_CONFIG
from tests.kit.vllm_emulated import Client, VllmProcess

ADAPTERS, SLOTS, SEATS, ENGINES = 16, 4, 64, 1
SCALE = 1.0
"""Of the time of a step: promises begin with the pace of an A100."""
CLIENTS = 256
"""Four times as many requests as there are seats: the rest is what there is to put in order."""
LANES = "path", "lane"
"""They run at the same time: a machine that is busy with other things is so for both."""
LESS_MAX = 0.1
"""Of the tokens of a step: what a broken order costs and a busy machine does not. The goal is 0.02, which the printed
ratio shows on a machine that does nothing else.
"""


@dataclass(frozen=True)
class Ran:
    """What a trace came to: tokens and steps of the engines, and the ends of requests as the sidecar logged them."""

    tokens: int
    steps: int
    whole: int
    ends: Sequence[dict[str, Any]]

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps

    @property
    def counted(self) -> int:
        """The tokens that the sidecar knows of, or estimates."""
        return sum(end["output_tokens"] for end in self.ends)

    @property
    def over_bound(self) -> list[dict[str, Any]]:
        """The requests that waited for longer than they were promised."""
        return [end for end in self.ends if end["bound_ms"] is not None and end["queue_ms"] > end["bound_ms"]]


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.nightly)])
async def test_the_order_is_that_of_the_path(tmp_path: Path, count: int, capsys: Any) -> None:
    """Nobody waits longer than promised in either, and a step has as many tokens."""
    trace = trace_of(count)
    both = await asyncio.gather(*(run(tmp_path / lane, trace, lane == "lane") for lane in LANES))
    ran = dict(zip(LANES, both, strict=True))
    with capsys.disabled():
        for lane, one in ran.items():
            promised = [end for end in one.ends if end["bound_ms"] is not None]
            nearest = max(end["queue_ms"] / end["bound_ms"] for end in promised)
            print(
                f"\n{lane}: {one.tokens_per_step:.2f} tokens a step, {one.steps} steps, {len(promised)} promises, the "
                f"longest wait {nearest:.2f} of its bound; {one.counted / one.tokens:.3f} of the tokens counted",
                end="",
            )
            print(f"\nratio {ran['lane'].tokens_per_step / ran['path'].tokens_per_step:.3f}", end="")
    for one in ran.values():
        assert one.whole == count
        assert [end["outcome"] for end in one.ends] == ["ok"] * count
        assert one.over_bound == []
    assert ran["lane"].tokens_per_step > (1 - LESS_MAX) * ran["path"].tokens_per_step


def trace_of(count: int) -> list[tuple[str, int]]:
    """Return names and lengths of answers: few adapters are asked for often, as Zipf has it."""
    chosen = random.Random(1)
    weights = [1 / (1 + number) for number in range(ADAPTERS)]
    names = chosen.choices([f"a{number:02}" for number in range(ADAPTERS)], weights, k=count)
    return [(name, chosen.randrange(16, 112)) for name in names]


async def run(
    folder: Path,
    trace: Sequence[tuple[str, int]],
    in_lane: bool,
    changed: Change = lambda record: None,
) -> Ran:
    """Send a trace through Envoy and the lane, or to the http listener. `changed` changes Envoy's bootstrap."""
    (folder / "shared").mkdir(parents=True)
    write_adapters(folder / "adapters", ADAPTERS)
    base = folder / "base.json"
    base.write_text(json.dumps(BASE_CONFIG))
    options = ("--compute", "none", "--max-loras", str(SLOTS), "--seats", str(SEATS))
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        engines = [await enter(VllmProcess(*options, time_scale=SCALE)) for _ in range(ENGINES)]
        common = {
            "adapters_dir": str(folder / "shared"),
            "engine": {"device_pages": SLOTS, "host_pages": ADAPTERS, "seats": SEATS},
            "base_model": {"name": "tiny-llama", "aliases": ["base"], "config": str(base)},
        }
        backends = [
            {"url": f"vllm://{engine.http_address}", "id": f"vllm-{number}", **common}
            for number, engine in enumerate(engines)
        ]
        adapters = {"serve": str(folder / "adapters")}
        sidecar = await enter(SidecarProcess(folder, backends, picks=True, adapters=adapters, log_format="json"))
        envoy = await enter(EnvoyServer(folder / "envoy", sidecar.endpoint_picker, changed=changed))
        before = [await _counted(engine) for engine in engines]
        whole = await _send(envoy.address if in_lane else sidecar.http, trace)
        after = [await _counted(engine) for engine in engines]
        async with asyncio.timeout(60):
            while len(ends := _ends(sidecar)) < len(trace):
                await asyncio.sleep(0.2)
    tokens, steps = (sum(each[index] for each in after) - sum(each[index] for each in before) for index in range(2))
    return Ran(tokens, steps, whole, ends)


async def _send(address: str, trace: Sequence[tuple[str, int]]) -> int:
    """Send it by so many clients at once; return how many answers were whole."""
    requests = iter(trace)

    async def ask() -> int:
        whole = 0
        async with QuickClient(address) as client:
            for name, tokens in requests:
                answer = await client.stream(name, "hello", tokens, {"return_token_ids": True})
                whole += answer.status == 200 and answer.body.endswith(b"data: [DONE]\n\n")
        return whole

    return sum(await asyncio.gather(*(ask() for _ in range(CLIENTS))))


async def _counted(engine: VllmProcess) -> tuple[int, int]:
    """Return the tokens and the steps of an engine so far."""
    async with Client(engine.http_address) as client:
        names = "vllm:generation_tokens_total", "vllm:iteration_tokens_total_count"
        tokens, steps = [int(await client.sample(name)) for name in names]
        return tokens, steps


def _ends(sidecar: SidecarProcess) -> list[dict[str, Any]]:
    """Return the log's records of requests that have ended."""
    records = [json.loads(line) for line in sidecar.logged().splitlines() if line.startswith("{")]
    return [record for record in records if record.get("outcome")]
