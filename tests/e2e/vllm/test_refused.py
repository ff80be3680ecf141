"""What vLLM would trust or break on is refused before it is sent; what vLLM refuses all the same harms nobody else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from sidecar.core.effects import Load
from sidecar.proto import admin_pb2
from tests.e2e.vllm.direct import http_client, load, registered, unload
from tests.e2e.vllm.fronted import ask, in_front
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import DIMS, NAMES, Toy, prompt, write_version
from tests.kit.peft_files import read_tensors, write_safetensors

PROMPT, TOKENS = prompt(4, 20), 6
WEIGHTS = "adapter_model.safetensors"


def lying(folder: Path) -> Path:
    """Tensors of rank 16 under `r: 8`, which vLLM loads and answers wrongly with."""
    path = write_version(folder, seed=1, rank=16)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    return path


def corrupt(folder: Path) -> Path:
    path = write_version(folder, seed=1)
    (path / WEIGHTS).write_bytes(b"x" * 4096)
    return path


def cut_short(folder: Path) -> Path:
    path = write_version(folder, seed=1)
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-4096])
    return path


BAD: list[tuple[Callable[[Path], Path], str]] = [
    (lying, "rank"),
    (corrupt, "header"),
    (cut_short, WEIGHTS),
    (lambda folder: write_version(folder, seed=1, use_dora=True), "DoRA"),
]


@pytest.mark.parametrize(("made", "reason"), BAD, ids=["lying config", "corrupt", "cut short", "DoRA"])
async def test_bad_files_never_reach_the_engine(
    server: VllmServer, toy: Toy, tmp_path: Path, made: Callable[[Path], Path], reason: str
) -> None:
    """The registration fails with the reason, and nothing is left of it."""
    path = made(tmp_path / "bad")
    async with in_front(server, toy.adapters, tmp_path) as front:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await front.served.adapters.Register(admin_pb2.RegisterRequest(name="bad", path=str(path)))
        assert reason in (refused.value.details() or "")
        told = await ask(front.client, "bad", PROMPT, TOKENS)
        assert (told.status, "unknown adapter" in told.error) == (404, True)
        assert front.served.recorder.count(Load) == 0
        async with http_client(server.http_address) as direct:
            assert await registered(direct) == {}


async def test_what_it_would_take_and_answer_wrongly_by(either: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """Narrower tensors, and modules that its model does not have: both load with 200 at the bare engine.

    The sizes of its model are not configured, so it is tried, and the adapters that fit are served.
    """
    narrow = write_version(tmp_path / "narrow", seed=1, shape=replace(DIMS, hidden=DIMS.hidden // 2))
    elsewhere = write_version(tmp_path / "elsewhere", seed=1)
    tensors = {
        name.replace(".model.layers.", ".language_model.model.layers."): values
        for name, values in read_tensors(elsewhere).items()
    }
    write_safetensors(elsewhere / WEIGHTS, tensors)
    async with http_client(either.http_address) as direct:
        for path in (narrow, elsewhere):
            (await load(direct, path.name, path)).raise_for_status()
            (await unload(direct, path.name)).raise_for_status()
        async with in_front(either, toy.adapters, tmp_path) as front:
            for path, words in ((narrow, "the engine's model is larger there"), (elsewhere, "would change nothing")):
                await front.served.adapters.Register(admin_pb2.RegisterRequest(name=path.name, path=str(path)))
                told = await ask(front.client, path.name, PROMPT, TOKENS)
                assert told.status >= 400
                assert words in told.error
            right = toy.greedy(toy.adapters / NAMES[0], PROMPT, TOKENS)
            assert (await ask(front.client, NAMES[0], PROMPT, TOKENS)).tokens == right
            assert len(await registered(direct)) == 1
    assert either.is_running


async def test_a_rank_that_the_engine_does_not_take(server: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """With `engine.rank_max` it is refused by us: no backend takes it. The engine hears nothing of it."""
    path = write_version(tmp_path / "wide", seed=1, rank=64)
    async with in_front(server, toy.adapters, tmp_path) as front:
        try:
            await front.served.adapters.Register(admin_pb2.RegisterRequest(name="wide", path=str(path)))
            told = await ask(front.client, "wide", PROMPT, TOKENS)
            assert told.status >= 400
            words = told.error
        except grpc.aio.AioRpcError as refused:
            words = refused.details() or ""
        assert "64" in words
        assert "16" in words
        assert front.served.recorder.count(Load) == 0


async def test_what_the_engine_refuses_all_the_same(either: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """A limit that is declared wrongly: vLLM says 500, whoever asked hears why, and all others are answered."""
    path = write_version(tmp_path / "wide", seed=1, rank=64)
    backend: dict[str, Any] = {"engine": {"rank_max": 64}}
    async with in_front(either, toy.adapters, tmp_path, backend=backend) as front:
        await front.served.adapters.Register(admin_pb2.RegisterRequest(name="wide", path=str(path)))
        names = [*NAMES[:3], "wide"] * 6
        told = await asyncio.gather(*(ask(front.client, name, PROMPT, TOKENS) for name in names))
        for name, one in zip(names, told, strict=True):
            if name == "wide":
                assert one.status >= 400
                assert "LoRA rank 64 is greater than max_lora_rank 16" in one.error
            else:
                assert (one.error, one.tokens) == ("", toy.greedy(toy.adapters / name, PROMPT, TOKENS))
        assert front.served.state.backends["vllm-0"].takes_requests
        assert either.is_running
