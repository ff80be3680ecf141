"""Engines that come back with other weights are noticed: another seed is another model at the same address."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.enums import Phase
from sidecar.proto import admin_pb2 as pb
from sidecar.shell import weights_check
from tests.kit import trtllm_served
from tests.kit.emulated import EngineProcess, read_served, running_engine
from tests.kit.engine_process import EmulatorProcess
from tests.kit.serving import Serving, serving, until
from tests.kit.trtllm_emulated import TrtllmProcess
from tests.kit.vllm_emulated import VllmProcess

BASE = {"name": "tiny-llama"}
KINDS: dict[str, Callable[[], EmulatorProcess]] = {
    "core": EngineProcess,
    "not decoupled": lambda: EngineProcess("--no-decoupled"),
    "llmapi": lambda: EngineProcess("--protocol", "llmapi"),
    "vllm": VllmProcess,
    "trtllm": TrtllmProcess,
}


@asynccontextmanager
async def served_by(engine: Any, folder: Path, kind: str = "core", **record: Any) -> AsyncIterator[Serving]:
    (folder / "adapters").mkdir(exist_ok=True)
    backend: dict[str, Any] = {"base_model": BASE}
    if kind == "trtllm":
        backend = trtllm_served.entry_of(folder)
    elif kind in ("llmapi", "vllm"):
        backend["adapters_dir"] = str(folder / "shared")
    async with serving([engine], folder / "adapters", backend=backend, **{"weights_check": "warn"} | record) as served:
        yield served


def differing(served: Serving) -> list[str]:
    return list(served.sidecar.gateway.fleet.check.differing.values())


def the_backend(served: Serving) -> Any:
    (backend,) = served.state.backends.values()
    return backend


async def restart(engine: EmulatorProcess, served: Serving, seed: int, up: bool = True) -> None:
    """Have an engine end and come back; wait until it is reached."""
    await engine.kill()
    await until(lambda: the_backend(served).phase is Phase.DOWN)
    given = [each for at, each in enumerate(engine._arguments) if "--seed" not in (each, engine._arguments[at - 1])]
    engine._arguments = (*given, "--seed", str(seed))
    await engine.start()
    if up:
        await until(lambda: the_backend(served).phase is Phase.UP)


async def verdict(served: Serving) -> str:
    return str((await served.queues.Get(pb.QueueRequest())).verdict)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_engine_with_other_weights_is_told(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In log, verdict, list and metric. The engine goes on, and if it comes back as it was then, nothing is told."""
    async with KINDS[kind]() as engine, served_by(engine, tmp_path, kind) as served:
        assert differing(served) == []
        with caplog.at_level(logging.WARNING):
            await restart(engine, served, seed=7)
        name = the_backend(served).id
        told = f"{name} answers otherwise than before: has it other weights?"
        assert differing(served) == [told]
        assert f"{told} (weights_check: warn)" in caplog.text
        assert told in await verdict(served)
        (listed,) = (await served.backends.List(pb.ListBackendsRequest())).backends
        assert told in listed.detail
        _, text = await served.sidecar.metrics.render()
        assert f'lora_sidecar_backend_weights_differ{{backend="{name}"}} 1.0' in text.decode()
        if kind != "llmapi":
            assert (await served.ask("", 2)).tokens
        await restart(engine, served, seed=7)
        assert differing(served) == []
        assert told not in await verdict(served)


@pytest.mark.parametrize("kind", ["core", "vllm"])
async def test_an_engine_with_other_weights_is_not_used_where_that_is_configured(kind: str, tmp_path: Path) -> None:
    async with KINDS[kind]() as engine, served_by(engine, tmp_path, kind, weights_check="refuse") as served:
        await restart(engine, served, seed=7, up=False)
        await until(lambda: bool(differing(served)))
        assert the_backend(served).phase is Phase.DOWN
        asked = asyncio.create_task(served.ask("", 2))
        await restart(engine, served, seed=0)
        assert (await asked).tokens
        assert differing(served) == []


async def test_engines_of_one_base_model_are_compared(tmp_path: Path) -> None:
    """Where two have the same name of it; nobody knows which of them is right, so both are named."""
    for base_model, count in ((BASE, 1), (None, 0)):
        async with AsyncExitStack() as stack:
            engines = [await stack.enter_async_context(running_engine(seed=seed)) for seed in (0, 0, 7)]
            backend = {} if base_model is None else {"base_model": base_model}
            served = await stack.enter_async_context(serving(engines, backend=backend, weights_check="warn"))
            others = {"trt-0", "trt-1", "trt-2"}
            assert len(differing(served)) in ((count, 2) if count else (0,))  # the odd one may have come first
            for told in differing(served):
                first, second = (word.rstrip(":") for word in told.split() if word.rstrip(":") in others)
                assert "trt-2" in (first, second)


async def test_no_question_is_asked_where_it_is_off(tmp_path: Path) -> None:
    async with (
        running_engine(served_log=tmp_path / "served") as engine,
        served_by(engine, tmp_path, weights_check="off"),
    ):
        assert read_served(tmp_path / "served", check=True) == []


async def test_the_core_hears_nothing_of_the_question(tmp_path: Path) -> None:
    async with (
        running_engine(served_log=tmp_path / "served") as engine,
        served_by(engine, tmp_path) as served,
    ):
        (line,) = read_served(tmp_path / "served", check=True)
        assert (line["request_id"], line["task_id"]) == ("lora-sidecar-weights", None)
        assert line["tokens"] <= weights_check.TOKENS
        assert (await served.ask("", 2)).tokens
        numbers = {event.request for event in served.recorder.events if hasattr(event, "request")}
        assert numbers == {1}


async def test_of_an_engine_that_does_not_answer_in_time_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is used as soon as the time is over."""
    monkeypatch.setattr(weights_check, "ANSWER_S", 0.2)
    async with (
        running_engine(freeze_after=1, compute="none", shape="tiny") as engine,
        served_by(engine, tmp_path) as served,
    ):
        assert the_backend(served).phase is Phase.UP
        assert differing(served) == []


async def test_a_sidecar_that_stops_while_it_asks(tmp_path: Path) -> None:
    async with running_engine(freeze_after=1, compute="none", shape="tiny") as engine:
        async with serving([engine], until_up=False, weights_check="warn") as served:
            await until(lambda: bool(served.sidecar.gateway.fleet._checking))
        await until(lambda: not served.sidecar.gateway.fleet._checking)
