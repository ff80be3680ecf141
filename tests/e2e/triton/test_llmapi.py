"""The sidecar in front of a real Triton with the LLM-API model: staged files, by name, decoupled or not."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.effects import Heal
from tests.e2e.triton.lanes import TRITON, server_of
from tests.integration.test_llmapi import answer_of, key_of, staged, told
from tests.kit.serving import Serving, serving, write_adapters

ENGINE = {
    "protocol": "llmapi",
    "compute": "none",
    "lora_modules": ("attn_q", "attn_v"),
    "max_lora_rank": 8,
    "lora_max_rank_cached": 8,
    "lora_host_pages": 6,
    "lora_device_pages": 4,
}


@asynccontextmanager
async def in_front(tmp_path: Path, names: int, decoupled: bool, **config: Any) -> AsyncIterator[tuple[Serving, Path]]:
    """Run a real Triton and a sidecar that shares a folder with it."""
    write_adapters(tmp_path / "adapters", names)
    shared = tmp_path / "shared"
    server = server_of(TRITON, tmp_path / "server", ENGINE | {"decoupled": decoupled})
    await server.start()
    try:
        backend = {"adapters_dir": str(shared)}
        async with serving([server], tmp_path / "adapters", backend=backend, **config) as served:
            yield served, shared
    finally:
        await server.kill()


@pytest.mark.parametrize("decoupled", [True, pytest.param(False, marks=pytest.mark.nightly)])
async def test_by_name_and_healed(tmp_path: Path, decoupled: bool) -> None:
    """Each answer is its adapter's; files that somebody has taken away are brought again at no client's cost."""
    async with in_front(tmp_path, 2, decoupled) as (served, shared):
        for name in ("a00", "a01", "", "a00"):
            text, messages = await told(served, name, 6)
            assert text == answer_of(served, name, 6)
            assert len(messages) == (6 if decoupled else 1)
        assert staged(shared) == sorted(key_of(served, name) for name in ("a00", "a01"))
        shutil.rmtree(shared / key_of(served, "a00"))
        assert (await told(served, "a00"))[0] == answer_of(served, "a00", 4)
        assert [heal.reason for heal in served.recorder.of(Heal)] == ["engine_miss"]


@pytest.mark.nightly
@pytest.mark.parametrize("decoupled", [True, False])
async def test_many_adapters_over_small_caches(tmp_path: Path, decoupled: bool) -> None:
    """The engine holds six of 32 and the store a few more: 200 requests, all answered with the adapter they name."""
    async with in_front(tmp_path, 32, decoupled, store={"memory_bytes": 300_000}) as (served, shared):
        picked = random.Random(7).choices([f"a{number:02}" for number in range(32)], k=200)
        limit = asyncio.Semaphore(24)

        async def one(name: str) -> str:
            async with limit:
                return (await told(served, name, 3))[0]

        answers = await asyncio.gather(*map(one, picked))
        assert answers == [answer_of(served, name, 3) for name in picked]
        assert 0 < len(staged(shared)) < 32
