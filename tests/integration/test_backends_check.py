"""What `sidecar backends check` finds at live engines, each with one thing wrong."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from sidecar.backends import faults
from sidecar.backends.checking import result_of
from sidecar.backends.checks.finding import State, Target
from sidecar.backends.triton.checks import memory, runs
from sidecar.backends.triton.checks.look import Look
from sidecar.core.enums import Fault
from sidecar.core.facts import EngineFacts
from sidecar.lab.engine.kserve import shared_memory
from tests.kit.emulated import channel_to
from tests.kit.looking import engine_and_target, http_server, look, regions_of, worse
from tests.kit.ports import free_port


@pytest.mark.parametrize("decoupled", [True, False])
async def test_an_engine_that_serves(tmp_path: Path, decoupled: bool) -> None:
    """All is well, decoupled or not but for what a client misses then; the engine is left as it was."""
    async with engine_and_target(tmp_path, decoupled=decoupled) as (engine, target):
        found = await look(target)
        assert worse(found) == ({} if decoupled else {"decoupled": State.WARNING})
        assert "by gRPC" in found["adapter"].text
        assert "by shared memory" in found["adapter, shared"].text
        assert "64 seats" in found["metrics"].text
        assert "triton 2.51.0" in found["reachable"].text
        if not decoupled:
            assert "config.pbtxt: model_transaction_policy { decoupled: true }" in found["decoupled"].fix
        assert await regions_of(engine.grpc_address) == []
        assert all(served.tokens <= 1 for served in engine.served)
        once = len(engine.served)
        assert once <= 5
        await look(target)
        assert len(engine.served) == 2 * once
        assert len({served.task_id for served in engine.served if served.task_id and served.error is None}) == 2


async def test_a_bfloat16_engine(tmp_path: Path) -> None:
    """The tiny adapter is made in the dtype that the model takes."""
    async with engine_and_target(tmp_path, dtype="bfloat16") as (_, target):
        found = await look(target)
        assert worse(found) == {}
        assert "bfloat16" in found["adapter"].text


async def test_a_declared_dtype_that_contradicts_the_model(tmp_path: Path) -> None:
    """Both values are named, and both ways out, each with its file and line."""
    async with engine_and_target(tmp_path) as (_, target):
        found = await look(replace(target, facts=replace(target.facts, dtype="bfloat16")))
        assert worse(found) == {"dtype": State.FAILED}
        assert "lora_weights is FP16 and the engine is declared as bfloat16" in found["dtype"].text
        assert "config.pbtxt, input lora_weights: data_type: TYPE_BF16" in found["dtype"].fix
        assert "config.yaml: engine: {dtype: float16}" in found["dtype"].fix


async def test_an_engine_of_another_dtype_than_its_model_says(tmp_path: Path) -> None:
    """Nobody declares it, and the engine itself refuses the weights: the config.pbtxt is what is wrong."""
    async with engine_and_target(tmp_path, dtype="bfloat16", lora_weights="fp16") as (_, target):
        found = await look(replace(target, facts=replace(target.facts, dtype=None)))
        assert found["dtype"].state is State.WARNING
        assert found["adapter"].state is State.FAILED
        assert "same data type as base model" in found["adapter"].text
        assert "data_type: TYPE_BF16" in found["adapter"].fix
        assert found["resident"].text == 'not looked at, because of "adapter"'


async def test_nothing_is_declared(tmp_path: Path) -> None:
    """What is not known is named with the line that would declare it; what can be looked at still is."""
    async with engine_and_target(tmp_path) as (_, target):
        found = await look(Target("bare", target.address))
        for name in ("dtype", "engine", "cache", "metrics"):
            assert found[name].state is State.WARNING, name
            assert "config.yaml:" in found[name].fix
        assert found["adapter"].state is State.SKIPPED
        assert "engine: {config:" in found["adapter"].fix
        assert found["unknown id"].state is State.OK
        assert result_of(list(found.values())) is State.WARNING


async def test_metrics_that_are_not_there(tmp_path: Path) -> None:
    """A configured URL that is dead fails, the usual one only warns; both say what stays unknown."""
    async with engine_and_target(tmp_path) as (_, target), engine_and_target(tmp_path) as (_, other):
        dead = await look(replace(target, metrics_url=f"http://127.0.0.1:{free_port()}/metrics"))
        assert dead["metrics"].state is State.FAILED
        assert "hangs or restarts" in dead["metrics"].text
        not_metrics = await look(replace(target, metrics_url=f"http://{other.address}/metrics"))
        assert not_metrics["metrics"].state is State.FAILED
        usual = replace(target, metrics_url=None, usual_metrics_url=target.metrics_url)
        assert (await look(usual))["metrics"].state is State.OK
        usual_dead = replace(target, metrics_url=None, usual_metrics_url=f"http://127.0.0.1:{free_port()}/metrics")
        assert (await look(usual_dead))["metrics"].state is State.WARNING


async def test_metrics_of_another_model(tmp_path: Path) -> None:
    """An engine's metrics that say nothing of the model are told from none at all."""
    async with engine_and_target(tmp_path) as (_, target), http_server(b"# TYPE nv_inference_count counter\n") as port:
        found = await look(replace(target, metrics_url=f"http://127.0.0.1:{port}/metrics"))
        assert found["metrics"].state is State.WARNING
        assert 'no nv_trt_llm_* gauges of "tensorrt_llm"' in found["metrics"].text


async def test_a_cache_that_holds_no_adapter_of_the_largest_rank(tmp_path: Path) -> None:
    """Zero fit, as far as is known; the parameter and a value that would do are given."""
    async with engine_and_target(tmp_path, lora_host_pages=4) as (_, target):
        found = await look(replace(target, facts=replace(target.facts, host_pages=4)))
        assert found["cache"].state is State.FAILED
        assert "0 of rank 64" in found["cache"].text
        assert 'parameters { key: "lora_cache_host_memory_bytes"' in found["cache"].fix
        assert found["resident"].state is State.OK


async def test_an_engine_without_lora(tmp_path: Path) -> None:
    """It takes ids and answers as the base model: the silent failure is found by an id that nobody loaded."""
    async with engine_and_target(tmp_path, lora_modules=()) as (_, target):
        found = await look(target)
        assert found["unknown id"].state is State.FAILED
        assert "in silence" in found["unknown id"].text
        assert "--lora_plugin" in found["unknown id"].fix


async def test_declared_modules_that_the_engine_does_not_have(tmp_path: Path) -> None:
    """The tiny adapter is on every declared module, so the engine's own words say which one it lacks."""
    async with (
        engine_and_target(tmp_path) as (_, complete),
        engine_and_target(tmp_path, lora_modules=("attn_q", "attn_v")) as (_, target),
    ):
        found = await look(replace(target, facts=complete.facts))
        assert found["adapter"].state is State.FAILED
        assert "not enabled" in found["adapter"].text
        assert "not what it was built with" in found["adapter"].text


async def test_several_instances(tmp_path: Path) -> None:
    """Their caches cannot be addressed: the drawback is told, and the line that ends it."""
    async with engine_and_target(tmp_path, instances=4) as (_, target):
        found = await look(target)
        assert found["instances"].state is State.WARNING
        assert found["instances"].text.startswith("CACHES 4, not addressable")
        assert "instance_group [ { count: 1 kind: KIND_CPU } ]" in found["instances"].fix
        assert found["resident"].state in (State.OK, State.WARNING)
        assert result_of(list(found.values())) is State.WARNING


async def test_a_server_that_does_not_see_our_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another container's /dev/shm: a warning, unless the configuration rests on it; weights still go by gRPC."""
    monkeypatch.setattr(shared_memory, "DIRECTORY", tmp_path)
    async with engine_and_target(tmp_path) as (engine, target):
        found = await look(target)
        assert worse(found) == {"shared memory": State.WARNING, "adapter, shared": State.SKIPPED}
        assert "--ipc=host" in found["shared memory"].fix
        insists = await look(replace(target, transport="shared_memory"))
        assert insists["shared memory"].state is State.FAILED
        assert await regions_of(engine.grpc_address) == []


async def test_a_region_goes_whatever_happens(tmp_path: Path) -> None:
    """An error or a cancellation inside leaves no region at the server and no file here."""
    async with engine_and_target(tmp_path) as (engine, target), channel_to(engine.grpc_address) as stub:
        looking = Look(target, None, stub, EngineFacts())  # type: ignore[arg-type]
        seen: list[str] = []
        entered = asyncio.Event()

        async def held() -> None:
            async with memory.region(looking, b"x" * 100) as name:
                seen.append(name)
                entered.set()
                await asyncio.Event().wait()

        async def fails() -> None:
            async with memory.region(looking, b"x") as name:
                seen.append(name)
                raise ZeroDivisionError

        task = asyncio.create_task(held())
        await entered.wait()
        assert await regions_of(engine.grpc_address) == seen
        task.cancel()
        await asyncio.wait([task])
        with pytest.raises(ZeroDivisionError):
            await fails()
        assert await regions_of(engine.grpc_address) == []
        assert not [name for name in seen if (Path("/dev/shm") / name).exists()]


async def test_an_engine_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live and ready, and no token comes: found within the bound, and nothing more is sent."""
    monkeypatch.setattr(runs, "RUN_S", 0.3)
    async with engine_and_target(tmp_path, freeze_after=0) as (_, target):
        found = await look(target)
        assert worse(found) == {
            "base model": State.FAILED,
            "adapter": State.SKIPPED,
            "adapter, shared": State.SKIPPED,
            "resident": State.SKIPPED,
            "unknown id": State.SKIPPED,
        }
        assert "hangs" in found["base model"].text


async def test_a_cache_full_of_adapters_in_use(tmp_path: Path) -> None:
    """A busy engine is not a broken one."""
    async with engine_and_target(tmp_path, full_errors=1) as (_, target):
        found = await look(target)
        assert found["adapter"].state is State.WARNING
        assert "nothing is proven" in found["adapter"].text
        assert found["resident"].state is State.SKIPPED


async def test_a_miss_in_words_that_are_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later engine says may be new to us: then heals would not be recognised."""
    known = tuple((text, fault) for text, fault in faults._TEXTS if fault is not Fault.MISS)
    monkeypatch.setattr(faults, "_TEXTS", known)
    async with engine_and_target(tmp_path) as (_, target):
        found = await look(target)
        assert worse(found) == {"unknown id": State.WARNING}
        assert "instead of being healed" in found["unknown id"].text
