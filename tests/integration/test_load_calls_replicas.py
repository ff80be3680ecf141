"""Load calls with several replicas: a load sent to one of them holds for all, on engines of any of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidecar.core.events import LoadDone
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, owned, replicas
from tests.kit.serving import Serving
from tests.kit.vllm_emulated import Client, running_vllm

VLLM: dict[str, Any] = {"compute": "none", "max_loras": 4, "max_cpu_loras": 8}


@dataclass
class Pool:
    replicas: list[Serving]
    clients: list[Client]
    folder: Path

    async def load(self, number: int, step: int, name: str = "grpo") -> Any:
        path = write_adapter(self.folder / f"{name}-{step}", seed=step)
        return await self.clients[number].load(name, path, load_inplace=True)


@asynccontextmanager
async def two(folder: Path) -> AsyncIterator[Pool]:
    """Run two replicas in front of two vLLMs and two Tritons. Each replica has its own idea of where files are."""
    (folder / "steps").mkdir()
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(running(folder / "redis"))
        engines: list[Any] = [(await stack.enter_async_context(running_vllm(**VLLM)))[0] for _ in range(2)]
        engines += [await stack.enter_async_context(running_engine(compute="none")) for _ in range(2)]
        record: dict[str, Any] = {"openai": {"load_calls": True}, "backend": {"adapters_dir": str(folder / "shared")}}
        pool = await stack.enter_async_context(
            replicas(2, redis.url, engines, folder / "steps", lease_s=CALM_S, **record)
        )
        clients = [await stack.enter_async_context(Client(served.sidecar.http_address)) for served in pool]
        yield Pool(pool, clients, folder / "steps")


async def test_a_load_holds_for_all_replicas_and_is_on_the_engines_of_each(tmp_path: Path) -> None:
    async with two(tmp_path) as pool:
        assert all(owned(served) for served in pool.replicas)
        for step in range(4):
            reply = await pool.load(step % 2, step)
            assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'grpo' added successfully.")
            assert reply.headers["x-lora-backends"] == "b0, b1, b2, b3"
            answers = await asyncio.gather(*(served.ask("grpo") for served in pool.replicas for _ in range(8)))
            assert {answer.origins[0].version for answer in answers} == {f"grpo@v{step + 1}"}
        loads = [sum(isinstance(event, LoadDone) for event in served.recorder.events) for served in pool.replicas]
        assert sum(loads) == 16
        assert (await pool.clients[0].unload("grpo")).status_code == 200
        for served in pool.replicas:
            assert "grpo" not in served.state.names
        assert (await pool.clients[1].unload("grpo")).status_code == 404


async def test_loads_of_one_name_at_both_replicas_leave_it_with_one_of_them(tmp_path: Path) -> None:
    async with two(tmp_path) as pool:
        replies = await asyncio.gather(pool.load(0, 1), pool.load(1, 2))
        assert [reply.status_code for reply in replies] == [200, 200]
        versions = {reply.headers["x-lora-version"] for reply in replies}
        answers = await asyncio.gather(*(served.ask("grpo") for served in pool.replicas for _ in range(4)))
        found = {answer.origins[0].version for answer in answers}
        assert len(found) == 1
        assert found <= versions
