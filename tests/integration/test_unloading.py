"""What operators are told of an adapter's weights when it is evicted or unregistered: engine by engine, and truly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.events import FirstToken
from sidecar.proto import admin_pb2, gateway_pb2
from tests.integration.test_vllm import ENGINE, fronted
from tests.kit.emulated import running_engine
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.vllm_emulated import running_vllm

KEEPS = "vLLM keeps its weights in memory until it evicts them (vllm#54839)"
LATER = "in use: unloaded as soon as its users are done"
NO_UNLOAD = "resident; its engine has no unload: it stays until the engine evicts it"
TOLD = {
    "triton": {"idle": NO_UNLOAD, "in use": NO_UNLOAD},
    "llmapi": {"idle": NO_UNLOAD, "in use": NO_UNLOAD},
    "python": {"idle": f"unloaded; {KEEPS}", "in use": f"{LATER}; {KEEPS}"},
    "rust": {"idle": "unloaded", "in use": LATER},
}
TOKENS = 300
kinds = pytest.mark.parametrize("kind", TOLD)


@asynccontextmanager
async def engine_of(kind: str, folder: Path) -> AsyncIterator[tuple[Serving, Any]]:
    """Run a sidecar before one engine, which takes some seconds for an answer of `TOKENS`."""
    write_adapters(folder / "adapters", 2)
    (folder / "shared").mkdir()
    if kind in ("triton", "llmapi"):
        options = {"shape": "tiny"} if kind == "triton" else {"protocol": "llmapi"}
        backend = {} if kind == "triton" else {"adapters_dir": str(folder / "shared")}
        async with (
            running_engine(compute="none", time_scale=1.0, **options) as engine,
            serving([engine], folder / "adapters", backend=backend) as served,
        ):
            yield served, engine
        return
    rust = {"rust_frontend": True, "allowed_prefix": (str(folder / "shared"),)} if kind == "rust" else {}
    async with (
        running_vllm(compute="none", max_loras=2, max_cpu_loras=4, time_scale=1.0, **rust) as (engine, client),
        fronted([engine], folder, backend={"engine": ENGINE}) as served,
    ):
        yield served, client


def places(answer: Any) -> Mapping[str, str]:
    return {place.place: place.result for place in answer.places}


async def ask(served: Serving, name: str, tokens: int) -> int:
    """Ask for a text, which every kind takes; return the number of messages."""
    request = gateway_pb2.GenerateRequest(adapter=name, text="hello", max_tokens=tokens)
    return len([message async for message in served.gateway.Generate(request)])


@asynccontextmanager
async def asked(served: Serving, name: str) -> AsyncIterator[None]:
    """Have a long answer run for the length of a block, and then come to its end."""
    before = len(served.recorder.events)
    asking = asyncio.create_task(ask(served, name, TOKENS))
    await until(lambda: any(isinstance(event, FirstToken) for event in served.recorder.events[before:]))
    yield
    assert await asking


@kinds
async def test_an_eviction_says_what_each_engine_keeps(tmp_path: Path, kind: str) -> None:
    async with engine_of(kind, tmp_path) as (served, _):
        backend = next(iter(served.state.backends))
        await ask(served, "a00", 4)
        answer = places(await served.adapters.Evict(admin_pb2.AdapterRequest(name="a00")))
        assert answer == {"host store": "dropped", backend: TOLD[kind]["idle"]}
        async with asked(served, "a00"):
            answer = places(await served.adapters.Evict(admin_pb2.AdapterRequest(name="a00")))
            held = "not held" if kind == "triton" else "in use: dropped as soon as its users are done"
            assert answer == {"host store": held, backend: TOLD[kind]["in use"]}
        unknown = places(await served.adapters.Evict(admin_pb2.AdapterRequest(name="a01")))
        assert unknown == {"host store": "not held", backend: "not resident"}


@kinds
async def test_unregistering_says_what_went_where(tmp_path: Path, kind: str) -> None:
    """It waits for the requests that run, so that nothing is in use when it answers."""
    async with engine_of(kind, tmp_path) as (served, _):
        backend = next(iter(served.state.backends))
        async with asked(served, "a00"):
            answer = places(await served.adapters.Unregister(admin_pb2.UnregisterRequest(name="a00", hold_s=60)))
            assert answer == {"host store": "dropped", backend: TOLD[kind]["idle"]}
        never_used = admin_pb2.UnregisterRequest(name="a01", hold_s=60)
        assert places(await served.adapters.Unregister(never_used)) == {}


async def test_what_another_name_stands_for_stays(tmp_path: Path) -> None:
    async with engine_of("python", tmp_path) as (served, client):
        path = str(tmp_path / "adapters" / "a00")
        await served.adapters.Register(admin_pb2.RegisterRequest(name="alias", path=path))
        await served.ask("alias")
        answer = places(await served.adapters.Unregister(admin_pb2.UnregisterRequest(name="alias")))
        assert answer == {"host store": "kept for a00", "vllm-0": "kept for a00"}
        await until(lambda: bool(served.state.names["a00"]))
        assert len(await client.models()) == 2


@pytest.mark.parametrize("kind", ["python", "rust"])
async def test_what_is_told_of_the_engines_memory_is_so(tmp_path: Path, kind: str) -> None:
    """The Python server forgets the name alone, as vLLM's issue 54839 says; the Rust front end frees the weights."""
    (tmp_path / "shared").mkdir()
    write_adapters(tmp_path / "adapters", 1)
    rust = {"rust_frontend": True, "allowed_prefix": (str(tmp_path / "shared"),)} if kind == "rust" else {}
    async with (
        running_vllm(compute="none", max_loras=2, max_cpu_loras=4, **rust) as (engine, client),
        fronted([engine], tmp_path) as served,
    ):
        await served.ask("a00")
        assert engine.engine.counters.host_pages_used == 1
        await served.adapters.Unregister(admin_pb2.UnregisterRequest(name="a00", hold_s=60))
        await until(lambda: not any((tmp_path / "shared").glob("[0-9a-f]*")))
        assert len(await client.models()) == 1
        assert engine.engine.counters.host_pages_used == (0 if kind == "rust" else 1)
