"""The vLLM backend in front of emulated vLLMs 0.33, of both front ends: what differs from 0.32 and would go wrong."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters.staging import AdaptersDir
from sidecar.backends.checks.finding import State
from sidecar.core.effects import Heal, Load
from sidecar.core.events import BackendLost, RunEnded
from sidecar.lab.engine.openai import VllmServer
from sidecar.proto import admin_pb2
from tests.integration.test_vllm import DUMMY, ENGINE, answer_of, engine_name, fronted, staged
from tests.kit.looking import look_at_vllm, vllm_and_target, worse
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, until, write_adapters
from tests.kit.vllm_emulated import BASE, Client, VllmProcess, expected, running_vllm, start_vllm

PYTHON: dict[str, Any] = {**DUMMY, "max_loras": 2, "max_cpu_loras": 4, "vllm_version": "0.33.0"}
OLDER = PYTHON | {"vllm_version": "0.32.0"}
ENDLESS = {"max_seq_tokens": 1_000_000, "kv_blocks": 10_000}
WORDS = {
    "0.32": "EngineCore encountered an issue",
    "0.33": "The server had an error while processing your request",
    "rust": "engine core reported fatal failure",
    "unknown": "Something else went wrong.",
}
KINDS = list(WORDS)[:3]


def options_of(kind: str, folder: Path) -> dict[str, Any]:
    rust = PYTHON | {"rust_frontend": True, "allowed_prefix": (str(folder),)}
    return {"0.32": OLDER, "0.33": PYTHON, "rust": rust}[kind]


@asynccontextmanager
async def rust_engine(folder: Path, **options: Any) -> AsyncIterator[tuple[VllmServer, Client]]:
    """Run a Rust front end that loads from below a folder."""
    async with running_vllm(**options_of("rust", folder) | options) as both:
        yield both


async def doomed(client: Client, folder: Path) -> str:
    """Register an adapter that the engine has dropped and whose files are gone; return its name: a request ends it."""
    for number in range(5):
        path = write_adapter(folder / "theirs" / f"t{number}", seed=50 + number)
        assert (await client.load(f"t{number}", path)).status_code == 200
    shutil.rmtree(folder / "theirs" / "t0")
    return "t0"


@pytest.mark.parametrize("kind", WORDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_death_heals_before_the_first_token(
    tmp_path: Path, kind: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever words it is told in, even ones that are not known: then `/health` tells. Nobody hears of it."""
    if kind == "unknown":
        monkeypatch.setattr("sidecar.lab.engine.openai.serving.DIED", WORDS[kind])
    (name,) = write_adapters(tmp_path / "adapters", 1)
    first = await start_vllm(**options_of("0.33" if kind == "unknown" else kind, tmp_path) | ENDLESS)
    async with (
        VllmProcess("--compute", "none", "--max-loras", "2", "--max-cpu-loras", "4") as second,
        Client(first.http_address) as direct,
        fronted([first, second], tmp_path) as served,
        Client(served.sidecar.http_address) as client,
    ):
        await second.kill()
        await until(lambda: not served.state.backends["vllm-1"].takes_requests)
        last = await doomed(direct, tmp_path)
        busy = [asyncio.create_task(direct.tokens(f"t{number}", tokens=900_000)) for number in (3, 4)]
        await until(lambda: first.engine.counters.active == 2)
        # Both slots are taken, so these wait inside the engine, and get theirs in one step: it is the last.
        loaded = len(first.served)
        dying = asyncio.create_task(direct.complete(last, tokens=2))
        await until(lambda: first.engine.counters.waiting == 1)
        asked = [asyncio.create_task(client.complete(name, tokens=4, stream=stream)) for _ in range(3)]
        await until(lambda: first.engine.counters.waiting >= 2)
        for task in busy:
            task.cancel()
        assert (await dying).status_code == 500
        await until(lambda: not served.state.backends["vllm-0"].takes_requests)
        await second.start()
        for answer in await asyncio.gather(*asked):
            assert answer.status_code == 200, answer.text
            assert "error" not in answer.text
        told = (WORDS[kind], "/health answers 503")  # a busy machine may ask before it has read the words
        assert any(words in cause for cause in _losses(served) for words in told)
        assert not [ending for ending in first.served[loaded:] if ending.model.startswith(name) and ending.tokens]
        assert (await served.ask(name)).tokens == answer_of(served, tmp_path, name)
    await first.stop()


async def test_a_name_that_is_there_already_is_loaded(tmp_path: Path) -> None:
    """Two sidecars share a server and a folder: the second one's load is refused as a repeat, and it answers."""
    (name,) = write_adapters(tmp_path / "adapters", 1)
    async with rust_engine(tmp_path) as (engine, client), fronted([engine], tmp_path) as one:
        assert (await one.ask(name)).tokens == answer_of(one, tmp_path, name)
        known = engine_name(one, name)
        again = await client.load(known, (await client.models())[known]["root"])
        assert (again.status_code, "is already loaded" in again.text) == (400, True)
        async with fronted([engine], tmp_path) as two:
            assert (await two.ask(name)).tokens == answer_of(two, tmp_path, name)
            assert (two.recorder.count(Load), two.recorder.count(Heal)) == (1, 0)


async def test_what_the_engine_refuses_to_remove_is_loaded_in_place_first(tmp_path: Path) -> None:
    """More adapters than it keeps in memory, evicted in the order of their loads: no name is ever without its files."""
    names = write_adapters(tmp_path / "adapters", 8)
    async with rust_engine(tmp_path) as (engine, client), fronted([engine], tmp_path) as served:
        for name in names:
            assert (await served.ask(name)).tokens == answer_of(served, tmp_path, name)
        for name in names:
            known = engine_name(served, name)
            folder = Path((await client.models())[known]["root"])
            await served.adapters.Evict(admin_pb2.AdapterRequest(name=name))
            is_known = True
            while is_known:
                was_there = _is_there(folder)
                is_known = known in await client.models()
                assert was_there or not is_known
            await until(lambda folder=folder: not folder.exists())  # type: ignore[misc]
        assert set(await client.models()) == {BASE}
        assert (await served.ask(names[0])).tokens == answer_of(served, tmp_path, names[0])


async def test_a_name_that_cannot_be_removed_keeps_its_files(tmp_path: Path) -> None:
    """The load in place fails, again and again: the files stay, and go when it succeeds."""
    names = write_adapters(tmp_path / "adapters", 6)
    async with rust_engine(tmp_path) as (engine, client), fronted([engine], tmp_path) as served:
        for name in names:
            await served.ask(name)
        known = engine_name(served, names[0])
        folder = Path((await client.models())[known]["root"])
        config = (folder / "adapter_config.json").read_bytes()
        (folder / "adapter_config.json").write_bytes(b"{")
        before = engine.adapters.copies[known]
        await served.adapters.Evict(admin_pb2.AdapterRequest(name=names[0]))
        backend: Any = served.sidecar.gateway.backends["vllm-0"]
        seen = _watched(backend)
        await until(lambda: len(seen) >= 3)
        assert engine.adapters.copies[known] is before
        assert _is_there(folder)
        (folder / "adapter_config.json").write_bytes(config)
        await until(lambda: not folder.exists())
        assert known not in await client.models()


def _is_there(folder: Path) -> bool:
    return folder.is_dir()


def _watched(backend: Any) -> list[str]:
    """Return a list that gets the name of each unload call from now on."""
    seen: list[str] = []
    dialect = backend._dialect

    async def watched(server: Any, name: str, timeout_s: float) -> Any:
        seen.append(name)
        return await dialect.unload(server, name, timeout_s)

    backend._dialect = copy(dialect)
    backend._dialect.unload = watched
    return seen


@pytest.mark.parametrize("rounds", [6, pytest.param(30, marks=pytest.mark.slow)])
async def test_files_of_a_cancelled_request_go_when_no_step_can_read_them(tmp_path: Path, rounds: int) -> None:
    """Its client leaves, and the adapter is evicted at once, again and again: the engine lives."""
    names = write_adapters(tmp_path / "adapters", 3)
    async with (
        rust_engine(tmp_path, **ENDLESS) as (engine, _),
        fronted([engine], tmp_path) as served,
        Client(served.sidecar.http_address) as client,
    ):
        other = asyncio.create_task(client.complete(BASE, tokens=900_000))
        for round_ in range(rounds):
            name = names[round_ % 3]
            leaving = asyncio.create_task(client.complete(name, tokens=900_000))
            await until(lambda: engine.engine.counters.active == 2)
            leaving.cancel()
            await served.adapters.Evict(admin_pb2.AdapterRequest(name=name))
            await until(lambda: not staged(tmp_path))
        assert not other.done()
        other.cancel()
        assert not _losses(served)


async def test_a_shared_folder_behind_a_link(tmp_path: Path) -> None:
    """The engine tells resolved paths; a name whose files have gone is known by them, and unloaded."""
    names = write_adapters(tmp_path / "adapters", 1)
    (tmp_path / "place").mkdir()
    (tmp_path / "shared").symlink_to(tmp_path / "place")
    gone = Path(shutil.copytree(tmp_path / "adapters" / names[0], tmp_path / "place" / "0123.files.p1.g0"))
    async with rust_engine(tmp_path) as (engine, client):
        assert (await client.load("old@0123", tmp_path / "shared" / gone.name)).status_code == 200
        assert (await client.models())["old@0123"]["root"] == str(gone)
        shutil.rmtree(gone)
        async with fronted([engine], tmp_path) as served:
            assert "old@0123" not in await client.models()
            assert (await served.ask(names[0])).tokens == answer_of(served, tmp_path, names[0])


async def test_a_restart_between_two_looks_is_seen_by_its_counter(tmp_path: Path) -> None:
    """It publishes no start; the count of its steps goes back, and its adapters are loaded again."""
    (name,) = write_adapters(tmp_path / "adapters", 1)
    engine = await start_vllm(**options_of("rust", tmp_path))
    async with fronted([engine], tmp_path) as served:
        assert (await served.ask(name, tokens=40)).tokens == answer_of(served, tmp_path, name, 40)
        backend: Any = served.sidecar.gateway.backends["vllm-0"]
        await until(lambda: (backend._seen.steps or 0) >= 40)
        assert backend._seen.started_at is None
        await engine.stop()
        engine = await start_vllm(**options_of("rust", tmp_path), http_port=int(engine.http_address.rpartition(":")[2]))
        await until(lambda: bool(_losses(served)))
        assert _losses(served) == ["it has restarted"]
        assert (await served.ask(name)).tokens == answer_of(served, tmp_path, name)
    await engine.stop()


def _losses(served: Serving) -> list[str]:
    return [event.cause for event in served.recorder.events if isinstance(event, BackendLost)]


async def test_what_it_does_not_publish_is_declared_or_learned(tmp_path: Path) -> None:
    """Without a declaration slots are learned, from one adapter at a time, and KV is not bounded."""
    names = write_adapters(tmp_path / "adapters", 4)
    for declared in ({}, ENGINE | {"kv_tokens": 4096}):
        async with (
            rust_engine(tmp_path) as (engine, _),
            fronted([engine], tmp_path, backend={"engine": declared}) as served,
        ):
            facts = served.state.backends["vllm-0"].facts
            assert (facts.device_pages, facts.kv_tokens) == ((2, 4096) if declared else (None, None))
            answers = await asyncio.gather(*(served.ask(name) for name in names * 4))
            for name, answer in zip(names * 4, answers, strict=True):
                assert answer.tokens == answer_of(served, tmp_path, name)


@pytest.mark.parametrize("chat", [False, True])
async def test_tokens_of_streams_without_ids_are_counted(tmp_path: Path, chat: bool) -> None:
    """A chat's role and the end of a choice are events, and no tokens."""
    (tmp_path / "adapters").mkdir()
    async with (
        rust_engine(tmp_path) as (engine, _),
        fronted([engine], tmp_path) as served,
        Client(served.sidecar.http_address) as client,
    ):
        asked = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        events = [event async for event in client.stream(path, model=BASE, max_tokens=9, ignore_eos=True, **asked)]
        assert len(events) == (1 if chat else 0) + 9 + 1 + 1
        (ended,) = [event for event in served.recorder.events if isinstance(event, RunEnded)]
        assert ended.output_tokens == 9


async def test_a_body_that_it_does_not_take(tmp_path: Path) -> None:
    """It hangs up under one of more than 32 MiB: its client is told, once, and the engine is not given up for it."""
    (tmp_path / "adapters").mkdir()
    http = {"address": "127.0.0.1:0", "body_bytes_max": 64 << 20}
    free = {"address": "127.0.0.1:0"}
    listeners = {"data": free, "admin": free, "http": http}
    async with (
        rust_engine(tmp_path) as (engine, _),
        fronted([engine], tmp_path, listeners=listeners) as served,
        Client(served.sidecar.http_address) as client,
    ):
        refused = await client.complete(BASE, "a" * (33 << 20))
        assert refused.status_code in (400, 502)
        told = refused.json()["error"]["message"]
        assert "length limit exceeded" in told or "it takes no body of 346" in told
        assert not _losses(served)
        assert (await client.tokens(BASE)) == expected("", None, 4)


async def test_backends_check(tmp_path: Path) -> None:
    """All is well where all is declared; what it does not publish or load from is told, and the way out."""
    rust = options_of("rust", tmp_path)
    async with vllm_and_target(tmp_path, **rust) as engine:
        target = replace(engine.target, facts=replace(engine.target.facts, kv_tokens=4096))
        found = await look_at_vllm(target)
        assert worse(found) == {}, found
        assert found["reachable"].text.startswith("vLLM 0.33.0, Rust front end at ")
        assert found["slots"].text == "2 declared (max_loras); its Rust front end does not say it"
        facts = replace(engine.target.facts, device_pages=None)
        found = await look_at_vllm(replace(engine.target, facts=facts))
        assert worse(found) == dict.fromkeys(("slots", "metrics"), State.WARNING)
        assert "its Rust front end does not publish it" in found["slots"].text
        assert "KV size is not published by its Rust front end" in found["metrics"].text
        assert await engine.is_as_before()
        unmade = await look_at_vllm(replace(target, base=None))
        assert unmade["LoRA updating"].state is State.OK
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for prefixes, word in (((), "to be configured"), ((str(elsewhere),), "outside"), ((str(tmp_path / "x"),), "exist")):
        async with vllm_and_target(tmp_path, **rust | {"allowed_prefix": prefixes}) as engine:
            fix = f"VLLM_RUNTIME_LORA_ALLOWED_PATH_PREFIXES={engine.shared} vllm serve"
            for base, check in ((engine.target.base, "adapter"), (None, "LoRA updating")):
                found = await look_at_vllm(replace(engine.target, base=base))
                assert found[check].state is State.FAILED
                assert word in found[check].text
                assert fix in found[check].fix
            assert await engine.is_as_before()
    async with vllm_and_target(tmp_path, **rust) as engine:
        unseen = AdaptersDir(engine.shared, str(tmp_path / "not-mounted"))
        found = await look_at_vllm(replace(engine.target, adapters_dir=unseen))
        assert "does not see what is staged" in found["adapter"].text
