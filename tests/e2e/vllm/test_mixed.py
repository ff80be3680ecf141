"""One gateway in front of a vLLM and a Triton, each with a base model of its own: names lead to the right engine."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import pytest

from tests.e2e.vllm.direct import http_client
from tests.e2e.vllm.fronted import ask, backend_of
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import BASE_MODEL, NAMES, Toy, prompt
from tests.kit.emulated import running_engine
from tests.kit.faults import assert_nothing_left
from tests.kit.peft_files import BASE_MODEL as TINY_BASE
from tests.kit.serving import serving, write_adapters

TOKENS, PROMPT = 6, prompt(6, 20)
TEXT = "select "


@pytest.fixture
def folders(toy: Toy, tmp_path: Path) -> Path:
    """A folder of adapters of both base models: a00 … a03 are for vLLM's, b00 … b03 for Triton's."""
    folder = tmp_path / "adapters"
    for name in write_adapters(folder, 4):
        (folder / name).rename(folder / name.replace("a", "b"))
    for name in NAMES[:4]:
        shutil.copytree(toy.adapters / name, folder / name)
    return folder


async def test_names_of_both(server: VllmServer, toy: Toy, folders: Path, tmp_path: Path) -> None:
    """Token ids as PEFT gives them from the one, text as the engine gives it from the other, all at once."""
    names = [f"{letter}0{number}" for letter in "ab" for number in range(4)]
    async with running_engine(compute="none") as triton:
        backends = [
            backend_of(server, tmp_path / "shared", base_model=BASE_MODEL),
            {"url": f"triton://{triton.grpc_address}", "id": "triton", "base_model": TINY_BASE},
        ]
        async with (
            serving([], folders, backends=backends) as served,
            http_client(served.sidecar.http_address) as client,
        ):
            order = random.Random(4).choices(names, k=64)

            async def one(name: str) -> None:
                if name.startswith("a"):
                    told = await ask(client, name, PROMPT, TOKENS)
                    assert told.headers["x-lora-backend"] == "vllm-0"
                    assert told.tokens == toy.greedy(toy.adapters / name, PROMPT, TOKENS)
                    return
                body = {"model": name, "prompt": TEXT, "max_tokens": TOKENS}
                reply = await client.post("/v1/completions", json=body)
                assert reply.headers["x-lora-backend"] == "triton"
                assert reply.json()["choices"][0]["text"] == bytes(served.expected(name, TOKENS)).decode()

            await asyncio.gather(*(one(name) for name in order))
            listed = (await client.get("/v1/models")).json()["data"]
            parents = {entry["id"]: entry["parent"] for entry in listed}
            assert {name: parents[name] for name in names} == {
                name: BASE_MODEL if name.startswith("a") else TINY_BASE for name in names
            }
            assert {entry["id"] for entry in listed if entry["parent"] is None} == {BASE_MODEL, TINY_BASE}
            await assert_nothing_left(served)
