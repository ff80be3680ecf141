"""Load calls in front of a pool of two kinds: a version is on every engine before its name answers by it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidecar.core.events import AdapterRegistered, LoadDone
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Answer, Serving, serving
from tests.kit.vllm_emulated import Client, running_vllm

VLLM: dict[str, Any] = {"compute": "none", "max_loras": 4, "max_cpu_loras": 8}
ADDED = "Success: LoRA adapter 'grpo' added successfully."


@dataclass
class Trainer:
    """What a trainer has: a folder in which it writes its steps, and a client of one URL."""

    served: Serving
    client: Client
    folder: Path
    engines: list[Any] = field(default_factory=list)

    def write(self, step: int, name: str = "step", **options: Any) -> Path:
        return write_adapter(self.folder / f"{name}-{step}", seed=step, **options)

    async def load(self, path: Path, name: str = "grpo", in_place: bool = True, **fields: Any) -> Any:
        return await self.client.load(name, path, load_inplace=in_place, **fields)

    async def step(self, step: int) -> str:
        """Load a step in place, and return the version that it became."""
        reply = await self.load(self.write(step))
        assert (reply.status_code, reply.text) == (200, ADDED)
        return str(reply.headers["x-lora-version"])

    async def answers(self, count: int = 8, name: str = "grpo") -> list[Answer]:
        return list(await asyncio.gather(*(self.served.ask(name) for _ in range(count))))


@asynccontextmanager
async def pool(folder: Path, vllms: int = 2, tritons: int = 2, **record: Any) -> AsyncIterator[Trainer]:
    async with AsyncExitStack() as stack:
        engines: list[Any] = [(await stack.enter_async_context(running_vllm(**VLLM)))[0] for _ in range(vllms)]
        engines += [await stack.enter_async_context(running_engine(compute="none")) for _ in range(tritons)]
        trainer = await stack.enter_async_context(trained(engines, folder, **record))
        yield trainer


@asynccontextmanager
async def trained(engines: list[Any], folder: Path, **record: Any) -> AsyncIterator[Trainer]:
    backend = {"adapters_dir": str(folder / "shared")} | record.pop("backend", {})
    (folder / "steps").mkdir(exist_ok=True)
    openai = {"load_calls": True} | record.pop("openai", {})
    async with (
        serving(engines, None, [folder / "steps"], openai=openai, backend=backend, **record) as served,
        Client(served.sidecar.http_address) as client,
    ):
        yield Trainer(served, client, folder / "steps", engines)


async def test_a_step_is_on_every_engine_before_the_name_answers_by_it(tmp_path: Path) -> None:
    async with pool(tmp_path) as trainer:
        assert await trainer.step(1) == "grpo@v1"
        events = trainer.served.recorder.events
        loads = [number for number, event in enumerate(events) if isinstance(event, LoadDone)]
        seen = [n for n, e in enumerate(events) if isinstance(e, AdapterRegistered) and e.allow is None]
        assert len(loads) == 4
        assert max(loads) < min(seen)
        answers = await trainer.answers()
        assert {origin.version for answer in answers for origin in answer.origins} == {"grpo@v1"}
