"""Adapters that a vLLM would take and answer wrongly by, where its model's sizes are not configured: it is tried."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from sidecar.core.effects import Load
from sidecar.proto import admin_pb2
from tests.integration.test_vllm import DUMMY, answer_of, engine_name, fronted, staged
from tests.kit.peft_files import ALL_LINEAR, TINY, read_tensors, write_adapter, write_safetensors
from tests.kit.serving import Serving, write_adapters
from tests.kit.vllm_emulated import BASE, Client, expected, running_vllm

WEIGHTS = "adapter_model.safetensors"
NARROW = {
    "hidden": replace(TINY, hidden=TINY.hidden // 2),
    "feed-forward": replace(TINY, ffn=TINY.ffn // 2),
    "a head for all": replace(TINY, kv_heads=1),
}
ENGINES: dict[str, dict[str, Any]] = {
    "0.32": {},
    "0.33": {"vllm_version": "0.33.0"},
    "rust": {"vllm_version": "0.33.0", "rust_frontend": True},
}


@asynccontextmanager
async def before(folder: Path, kind: str = "0.33", **options: Any) -> AsyncIterator[tuple[Serving, Client, Any]]:
    """Run a sidecar that knows nothing of the model's sizes before an emulated vLLM."""
    prefix = {"allowed_prefix": (str(folder),)} if kind == "rust" else {}
    async with (
        running_vllm(**DUMMY, max_loras=2, max_cpu_loras=4, **ENGINES[kind], **prefix, **options) as (
            engine,
            client,
        ),
        fronted([engine], folder) as served,
    ):
        yield served, client, engine


async def register(served: Serving, name: str, path: Path) -> None:
    await served.adapters.Register(admin_pb2.RegisterRequest(name=name, path=str(path)))


async def refusal(served: Serving, name: str) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.ask(name)
    return refused.value.details() or ""


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("narrow", NARROW)
async def test_narrower_tensors_are_refused(tmp_path: Path, kind: str, narrow: str) -> None:
    """By the module and its sizes; the engine has not got it, and nothing of the trials is left."""
    (name,) = write_adapters(tmp_path / "adapters", 1)
    bad = write_adapter(tmp_path / "bad", shape=NARROW[narrow], modules=ALL_LINEAR)
    async with before(tmp_path, kind) as (served, client, engine):
        assert (await client.load("direct", bad)).status_code == 200, "vLLM takes it"
        assert (await client.unload("direct")).status_code == 200
        await register(served, "bad", bad)
        told = await refusal(served, "bad")
        assert "the engine's model is larger there" in told
        assert "it was trained on another model" in told
        assert (await served.ask(name)).tokens == answer_of(served, tmp_path, name)
        assert not [each for each in engine.adapters.copies if each.startswith(("bad@", "lora-sidecar-check"))]
        assert not [each for each in staged(tmp_path) if each.startswith("lora-sidecar-check")]
        assert set(await client.models()) - {BASE} == set(engine.adapters.copies)


@pytest.mark.parametrize("kind", ENGINES)
async def test_those_that_fit_are_tried_once(tmp_path: Path, kind: str) -> None:
    """Two loads a kind of module, all refused; the next adapter of the same sizes costs none."""
    for seed in range(3):
        write_adapter(tmp_path / "adapters" / f"a{seed}", seed=seed, modules=ALL_LINEAR)
    async with before(tmp_path, kind) as (served, client, _):
        calls = _watched(served)
        for seed in range(3):
            name = f"a{seed}"
            assert (await served.ask(name)).tokens == answer_of(served, tmp_path, name)
            tried = [each for each in calls if each.startswith("lora-sidecar-check")]
            assert len(tried) == 2 * len(ALL_LINEAR)
        assert served.recorder.count(Load) == 3
        assert len(await client.models()) == 4


def _watched(served: Serving) -> list[str]:
    """Return a list that gets the name of each load call from now on."""
    backend: Any = served.sidecar.gateway.backends["vllm-0"]
    calls: list[str] = []
    dialect = backend._dialect

    async def watched(server: Any, name: str, *arguments: Any) -> Any:
        calls.append(name)
        return await dialect.load(server, name, *arguments)

    backend._dialect = copy(dialect)
    backend._dialect.load = watched
    if backend._fitting is not None:
        backend._fitting._dialect = backend._dialect
    return calls


async def test_no_trials_where_the_sizes_are_configured(tmp_path: Path) -> None:
    """The configured model's are compared instead, before anything is sent."""
    (name,) = write_adapters(tmp_path / "adapters", 1)
    config = tmp_path / "config.json"
    config.write_text(
        '{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, '
        '"head_dim": 16, "intermediate_size": 160}'
    )
    base = {"base_model": {"name": "tiny-llama", "config": str(config)}}
    async with (
        running_vllm(**DUMMY, max_loras=2, max_cpu_loras=4) as (engine, _),
        fronted([engine], tmp_path, backend=base) as served,
    ):
        calls = _watched(served)
        assert (await served.ask(name)).tokens == answer_of(served, tmp_path, name)
        assert [each for each in calls if each.startswith("lora-sidecar-check")] == []
        bad = write_adapter(tmp_path / "bad", shape=NARROW["hidden"])
        with pytest.raises(grpc.aio.AioRpcError, match="it was trained on another model"):
            await register(served, "bad", bad)


def renamed(path: Path, prefix: str) -> Path:
    """Give an adapter's modules the names that they have in a multimodal model, or in none."""
    tensors = {name.replace(".model.model.", f".model.{prefix}"): values for name, values in read_tensors(path).items()}
    write_safetensors(path / WEIGHTS, tensors)
    return path


@pytest.mark.parametrize("kind", ENGINES)
async def test_text_only_adapters_on_a_multimodal_model(tmp_path: Path, kind: str) -> None:
    """0.33 finds their modules. 0.32 would take them and answer as the base model, so it is not sent any."""
    (tmp_path / "adapters").mkdir()
    text = write_adapter(tmp_path / "text", seed=1)
    whole = renamed(write_adapter(tmp_path / "whole", seed=2), "model.language_model.")
    async with before(tmp_path, kind, multimodal=True) as (served, client, _):
        if kind == "0.32":
            assert (await client.load("direct", text)).status_code == 200
            assert await client.tokens("direct") == await client.tokens(BASE)
        for name, path in (("text", text), ("whole", whole)):
            await register(served, name, path)
        assert (await served.ask("whole")).tokens == expected(engine_name(served, "whole"), whole, 4)
        if kind == "0.32":
            told = await refusal(served, "text")
            assert "the adapter would change nothing" in told
            assert "which needs vLLM 0.33" in told
        else:
            assert (await served.ask("text")).tokens == expected(engine_name(served, "text"), text, 4)


async def test_a_multimodal_model_is_tried_though_its_sizes_are_configured(tmp_path: Path) -> None:
    """They fit, and the names still may not."""
    (tmp_path / "adapters").mkdir()
    text = write_adapter(tmp_path / "text", seed=1)
    config = tmp_path / "config.json"
    config.write_text(
        '{"text_config": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, '
        '"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 160}}'
    )
    base = {"base_model": {"name": "tiny-llama", "config": str(config)}}
    async with (
        running_vllm(**DUMMY, max_loras=2, max_cpu_loras=4, multimodal=True) as (engine, _),
        fronted([engine], tmp_path, backend=base) as served,
    ):
        await register(served, "text", text)
        assert "which needs vLLM 0.33" in await refusal(served, "text")


async def test_modules_that_the_model_does_not_have(tmp_path: Path) -> None:
    """By whatever names: it would load and change nothing."""
    (tmp_path / "adapters").mkdir()
    path = renamed(write_adapter(tmp_path / "elsewhere", seed=1), "language_model.model.")
    async with before(tmp_path) as (served, client, _):
        assert (await client.load("direct", path)).status_code == 200
        assert await client.tokens("direct") == await client.tokens(BASE)
        await register(served, "elsewhere", path)
        assert "the adapter would change nothing" in await refusal(served, "elsewhere")
