"""What `sidecar backends check` finds at emulated vLLMs, each with one thing wrong; it leaves nothing there."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters.base_model import base_model_of
from sidecar.adapters.staging import AdaptersDir
from sidecar.backends.checks import staged
from sidecar.backends.checks.finding import State
from sidecar.backends.openai.checks import server, tried
from sidecar.lab.engine.openai import adapters as emulated_adapters
from tests.kit.looking import TINY_BASE, look_at_vllm, vllm_and_target, worse
from tests.kit.peft_files import write_adapter
from tests.kit.serving import PATIENCE_S

STEPS_TO_ADAPTER = 2
"""Steps of the engine until it has answered the base model and taken the adapter."""


async def test_a_vllm_that_serves(tmp_path: Path) -> None:
    """All is well, a second time too; an adapter of the check's own was answered by its name and is gone again."""
    async with vllm_and_target(tmp_path) as engine:
        for _ in range(2):
            found = await look_at_vllm(engine.target)
            assert worse(found) == {}, found
        assert "0.32.0" in found["version"].text
        assert '"base", at most 8192 tokens a sequence, as declared' in found["model"].text
        assert "staged, loaded in" in found["adapter"].text
        assert found["slots"].text == "2 (max_loras), as declared"
        assert await engine.is_as_before()
        assert all(served.tokens <= 1 for served in engine.server.served)


async def test_nothing_is_declared(tmp_path: Path) -> None:
    """Each thing that vLLM does not publish is named, with what follows and the line that declares it."""
    async with vllm_and_target(tmp_path) as engine:
        facts = replace(
            engine.target.facts, base_models=(), device_pages=None, host_pages=None, seats=None, rank_max=None
        )
        found = await look_at_vllm(replace(engine.target, facts=facts, adapters_dir=None, base=None))
        expected = dict.fromkeys(("model", "shared folder", "slots", "seats", "rank"), State.WARNING)
        assert worse(found) == expected | {"adapter": State.SKIPPED}
        assert "config.yaml: engine: {device_pages: 2}" in found["slots"].fix
        assert "70 requests" in found["seats"].text
        assert "taken for max_loras, 2" in found["kept in memory"].text
        assert "adapters_dir" in found["shared folder"].fix
        unknown = await look_at_vllm(replace(engine.target, base=None))
        assert worse(unknown) == {"adapter": State.WARNING}
        assert "an adapter of smaller ones in silence" in unknown["adapter"].text
        assert "config: the folder of the model" in unknown["adapter"].fix


async def test_without_runtime_lora_updating(tmp_path: Path) -> None:
    """The routes are not there: the variable that makes them is named, the adapter is not tried."""
    async with vllm_and_target(tmp_path, runtime_lora=False) as engine:
        found = await look_at_vllm(engine.target)
        assert worse(found) == {"LoRA updating": State.FAILED, "adapter": State.SKIPPED}
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in found["LoRA updating"].fix


@pytest.mark.parametrize("can_load", [True, False])
async def test_started_without_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_load: bool) -> None:
    """The routes are there and the engine has no LoRA: found by a load, even where no adapter can be made."""

    def refuses(self: Any, name: str, path: str) -> None:
        raise emulated_adapters.worker_failed("LoRA is not enabled. Use --enable-lora to enable LoRA.")

    monkeypatch.setattr(emulated_adapters.Adapters, "_read", refuses)
    async with vllm_and_target(tmp_path) as engine:
        found = await look_at_vllm(replace(engine.target, base=TINY_BASE if can_load else None))
        failing = "adapter" if can_load else "LoRA updating"
        assert found[failing].state is State.FAILED
        assert "--enable-lora" in found[failing].fix
        assert await engine.is_as_before()


@pytest.mark.parametrize("trusted", [False, True])
async def test_an_old_version(tmp_path: Path, trusted: bool) -> None:
    """It is refused, with the issue's number; one that is used all the same warns and is tried."""
    async with vllm_and_target(tmp_path, vllm_version="0.31.1") as engine:
        found = await look_at_vllm(replace(engine.target, old_versions=trusted))
        assert found["version"].state is (State.WARNING if trusted else State.FAILED)
        assert "vllm#47724" in found["version"].text
        assert found["adapter"].state is (State.OK if trusted else State.SKIPPED)
        assert engine.server.served[-1].tokens <= 1


async def test_api_keys(tmp_path: Path) -> None:
    """None, a wrong one, the right one, and one that nobody asks for."""
    key, wrong = tmp_path / "key", tmp_path / "wrong"
    key.write_text("secret\n")
    wrong.write_text("guess\n")
    async with vllm_and_target(tmp_path, api_key="secret") as engine:
        none = await look_at_vllm(engine.target)
        assert none["API key"].state is State.FAILED
        assert "it wants an API key" in none["API key"].text
        assert none["base model"].text == 'not looked at, because of "API key"'
        refused = await look_at_vllm(replace(engine.target, api_key_file=str(wrong)))
        assert f"does not accept the key in {wrong}" in refused["API key"].text
        right = await look_at_vllm(replace(engine.target, api_key_file=str(key)))
        assert worse(right) == {}
    async with vllm_and_target(tmp_path) as engine:
        unasked = await look_at_vllm(replace(engine.target, api_key_file=str(key)))
        assert worse(unasked) == {"API key": State.WARNING}


async def test_another_model_than_declared(tmp_path: Path) -> None:
    """Under another name it may be the same: both names are told, and a longer sequence than is served warns."""
    async with vllm_and_target(tmp_path, max_seq_tokens=512) as engine:
        facts = engine.target.facts
        other = await look_at_vllm(replace(engine.target, facts=replace(facts, base_models=("mistral",))))
        assert worse(other) == {"model": State.WARNING}
        assert "base_model: {name: mistral, aliases: [base" in other["model"].fix
        longer = await look_at_vllm(replace(engine.target, facts=replace(facts, sequence_tokens_max=4096)))
        assert worse(longer) == {"model": State.WARNING}
        assert "sequence_tokens_max: 512" in longer["model"].fix


@pytest.mark.parametrize(("declared", "state"), [(1, State.WARNING), (2, State.OK), (3, State.FAILED)])
async def test_declared_slots(tmp_path: Path, declared: int, state: State) -> None:
    """More than there are make requests wait where nobody orders them, fewer leave some unused."""
    async with vllm_and_target(tmp_path) as engine:
        facts = replace(engine.target.facts, device_pages=declared)
        found = await look_at_vllm(replace(engine.target, facts=facts))
        assert found["slots"].state is state
        if state is not State.OK:
            assert "engine: {device_pages: 2}" in found["slots"].fix


async def test_folders(tmp_path: Path) -> None:
    """One that cannot be made here, and one that the engine calls otherwise or does not see."""
    async with vllm_and_target(tmp_path) as engine:
        missing = AdaptersDir(tmp_path / "missing" / "folder", "/missing")
        found = await look_at_vllm(replace(engine.target, adapters_dir=missing))
        assert found["shared folder"].state is State.FAILED
        assert found["adapter"].text == 'not looked at, because of "shared folder"'
        unseen = await look_at_vllm(replace(engine.target, adapters_dir=AdaptersDir(engine.shared, "/not/mounted")))
        assert worse(unseen) == {"adapter": State.FAILED}
        assert f"does not see what is staged in {engine.shared} as /not/mounted" in unseen["adapter"].text
        link = tmp_path / "mounted"
        link.symlink_to(engine.shared)
        elsewhere = await look_at_vllm(replace(engine.target, adapters_dir=AdaptersDir(engine.shared, str(link))))
        assert worse(elsewhere) == {}
        assert await engine.is_as_before()


async def test_a_rank_that_the_engine_does_not_take(tmp_path: Path) -> None:
    """The engine's own words, and both ways out."""
    async with vllm_and_target(tmp_path, max_lora_rank=1) as engine:
        found = await look_at_vllm(engine.target)
        assert worse(found) == {"adapter": State.FAILED}
        assert "LoRA rank 8 is greater than max_lora_rank 1" in found["adapter"].text
        declared = replace(engine.target, facts=replace(engine.target.facts, rank_max=1))
        assert worse(await look_at_vllm(declared)) == {}
        assert await engine.is_as_before()


async def test_adapters_of_others(tmp_path: Path) -> None:
    """They are counted and left alone; one whose files have gone keeps the check from displacing it."""
    write_adapter(tmp_path / "theirs", seed=1)
    write_adapter(tmp_path / "shared" / "gone", seed=2)
    async with vllm_and_target(tmp_path) as engine:
        for name, path in (("theirs", tmp_path / "theirs"), ("sql@0123456789ab", engine.shared / "gone")):
            assert (await engine.client.load(name, path)).status_code == 200
        found = await look_at_vllm(engine.target)
        assert found["adapters"].text == "1 of a sidecar and 1 that others loaded registered, left alone"
        assert worse(found) == {}
        (engine.shared / "gone").rename(tmp_path / "away")
        without = await look_at_vllm(engine.target)
        assert worse(without) == {"adapters": State.FAILED, "adapter": State.SKIPPED}
        assert '{"lora_name": "sql@0123456789ab"}' in without["adapters"].fix
        assert "the engine's end" in without["adapter"].text
        assert set(await engine.client.models()) == {"base", "theirs", "sql@0123456789ab"}


async def test_what_a_killed_check_has_left(tmp_path: Path) -> None:
    """An hour later its name is unloaded and its files go, in this order; those of one that runs stay."""
    left = {age: tmp_path / "shared" / f"{staged.PREFIX}{age}" / "key" for age in ("old", "new")}
    for path in left.values():
        write_adapter(path, seed=1)
    async with vllm_and_target(tmp_path) as engine:
        for age, path in left.items():
            await engine.client.load(f"lora-sidecar-check-{age}", path)
        long_ago = left["old"].stat().st_mtime - 2 * staged.FORGOTTEN_S
        os.utime(left["old"].parent, (long_ago, long_ago))
        assert worse(await look_at_vllm(engine.target)) == {}
        assert set(await engine.client.models()) == {"base", "lora-sidecar-check-new"}
        assert [path.name for path in engine.shared.iterdir()] == [left["new"].parent.name]


async def test_checks_side_by_side(tmp_path: Path) -> None:
    """None of them takes away what another one has loaded or staged."""
    async with vllm_and_target(tmp_path) as engine:
        all_found = await asyncio.gather(*(look_at_vllm(engine.target) for _ in range(4)))
        assert [worse(found) for found in all_found] == [{}] * 4
        assert await engine.is_as_before()


async def test_an_engine_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it lives, and no token comes: found within the bound, no adapter is loaded."""
    monkeypatch.setattr(server, "RUN_S", 0.3)
    async with vllm_and_target(tmp_path, freeze_after=0) as engine:
        found = await look_at_vllm(engine.target)
        assert worse(found) == {"base model": State.FAILED, "adapter": State.SKIPPED}
        assert "overloaded or hangs" in found["base model"].text


async def test_a_load_that_the_engine_refuses(tmp_path: Path) -> None:
    """Another shape than the base model's: the engine's words, and nothing is left behind."""
    record = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 160}
    async with vllm_and_target(tmp_path) as engine:
        found = await look_at_vllm(replace(engine.target, base=base_model_of(record)))
        assert found["adapter"].state is State.FAILED
        assert "the engine does not take it" in found["adapter"].text
        assert await engine.is_as_before()


async def test_an_adapter_that_is_never_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded, and no token comes: all slots may be taken, so nothing is proven; it is taken away all the same."""
    monkeypatch.setattr(tried, "RUN_S", 0.5)
    async with vllm_and_target(tmp_path, freeze_after=STEPS_TO_ADAPTER) as engine:
        found = await look_at_vllm(engine.target)
        assert worse(found) == {"adapter": State.WARNING}
        assert "its slots are all in use, or it hangs" in found["adapter"].text
        assert await engine.is_as_before()


async def test_a_check_that_is_ended(tmp_path: Path) -> None:
    """Cancelled while it waits for its adapter's answer, it still unloads it before the files go."""
    async with vllm_and_target(tmp_path, freeze_after=STEPS_TO_ADAPTER) as engine:
        looking = asyncio.create_task(look_at_vllm(engine.target))
        async with asyncio.timeout(PATIENCE_S):
            while len(await engine.client.models()) < 2:
                assert not looking.done()
        looking.cancel()
        await asyncio.wait([looking])
        assert looking.cancelled()
        assert await engine.is_as_before()
