"""A dialect that rests on no other server's: what is usual is enough to serve it, and to check it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
import yaml

from sidecar.backends import registry
from sidecar.core.effects import Heal
from sidecar.proto import admin_pb2
from tests.integration.test_backends_check_cli import sidecar
from tests.integration.test_backends_check_vllm_cli import TINY
from tests.kit.fake_quill import BASE, FakeQuill, ids_of, running_quill, words_of
from tests.kit.serving import Serving, serving, until, write_adapters


def entry_of(quill: FakeQuill, folder: Path) -> dict[str, Any]:
    url = f"quill://{quill.address}"
    return {"kind": "tests.kit.quill:DIALECT", "url": url, "id": "quill-0", "adapters_dir": str(folder / "shared")}


@pytest.fixture(autouse=True)
def known_here_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_from_elsewhere", {})


@asynccontextmanager
async def fronted(quill: FakeQuill, folder: Path) -> AsyncIterator[Serving]:
    async with serving([], folder / "adapters", [folder], backends=[entry_of(quill, folder)]) as served:
        yield served


def engine_name(served: Serving, name: str) -> str:
    return f"{name}@{served.state.names[name].digest[:12]}"


async def completed(served: Serving, name: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False) as http:
        body = {"model": name, "prompt": "a", "max_tokens": 8}
        answer = await http.post("/v1/completions", json=body, headers={"authorization": "Bearer mine"})
        assert answer.status_code == 200, answer.text
        record: dict[str, Any] = answer.json()
        return record


async def test_each_name_is_answered_by_its_adapter(tmp_path: Path) -> None:
    """Two adapters and the base model, by each API; no call has a key, and the facts are the engine's."""
    names = write_adapters(tmp_path / "adapters", 2)
    async with running_quill() as quill, fronted(quill, tmp_path) as served:
        for name in (*names, BASE):
            words = words_of(None if name == BASE else tmp_path / "adapters" / name)
            record = await completed(served, name)
            assert (record["model"], record["choices"][0]["text"]) == (name, words)
            tokens = (await served.ask("" if name == BASE else name, tokens=8)).tokens
            assert tokens == ids_of(words)
        chat = {"model": names[0], "messages": [{"role": "user", "content": "a"}]}
        async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False) as http:
            answer = (await http.post("/v1/chat/completions", json=chat)).json()
        assert answer["choices"][0]["message"]["content"] == words_of(tmp_path / "adapters" / names[0])
        assert set(quill.loaded) == {engine_name(served, name) for name in names}
        facts = served.state.backends["quill-0"].facts
        assert (facts.kind, facts.device_pages, facts.host_pages, facts.rank_max) == ("quill", 4, 16, 32)
        assert facts.kv_tokens == 4096
    assert quill.authorized == []
    models = {call["model"] for path, call in quill.calls if path.startswith("/v1/")}
    assert {model.partition("@")[0] for model in models} == {BASE, *(f"{BASE}+{name}" for name in names)}


async def test_an_eviction_unloads(tmp_path: Path) -> None:
    names = write_adapters(tmp_path / "adapters", 2)
    async with running_quill() as quill, fronted(quill, tmp_path) as served:
        for name in names:
            await served.ask(name)
        await served.adapters.Evict(admin_pb2.AdapterRequest(name=names[0]))
        await until(lambda: set(quill.loaded) == {engine_name(served, names[1])})
        await completed(served, names[0])
        assert len(quill.loaded) == 2
    assert quill.loaded == {}


async def test_what_a_restart_has_forgotten_is_loaded_again(tmp_path: Path) -> None:
    """Whether the restart was seen or not."""
    names = write_adapters(tmp_path / "adapters", 2)
    async with running_quill() as quill, fronted(quill, tmp_path) as served:
        right = {name: words_of(tmp_path / "adapters" / name) for name in names}

        async def answers() -> dict[str, str]:
            return {name: (await completed(served, name))["choices"][0]["text"] for name in names}

        assert await answers() == right
        quill.loaded.clear()
        assert await answers() == right
        assert served.recorder.count(Heal) > 0
        await quill.stop()
        await quill.start()
        assert await answers() == right
        assert set(quill.loaded) == {engine_name(served, name) for name in names}


async def test_a_name_that_a_server_cannot_list_is_unloaded_before_its_files_go(tmp_path: Path) -> None:
    """The server was away for a moment and has forgotten nothing."""
    (name,) = write_adapters(tmp_path / "adapters", 1)
    async with running_quill() as quill, fronted(quill, tmp_path) as served:
        await served.ask(name)
        quill.is_dead = True
        await until(lambda: not served.state.backends["quill-0"].takes_requests)
        quill.is_dead = False
        await until(lambda: served.state.backends["quill-0"].takes_requests)
        await served.adapters.Evict(admin_pb2.AdapterRequest(name=name))
        await until(lambda: not quill.loaded)
        assert [path for path, _ in quill.calls if path.endswith("/remove")]


async def test_without_a_folder_only_the_base_model_is_served(tmp_path: Path) -> None:
    (name,) = write_adapters(tmp_path / "adapters", 1)
    async with running_quill() as quill:
        entry = entry_of(quill, tmp_path)
        del entry["adapters_dir"]
        async with serving([], tmp_path / "adapters", [tmp_path], backends=[entry]) as served:
            with pytest.raises(grpc.aio.AioRpcError, match="unknown adapter"):
                await served.ask(name)
            assert (await served.ask("", tokens=8)).tokens == ids_of(words_of(None))
        assert quill.loaded == {}


async def test_a_name_that_is_there_already_is_loaded(tmp_path: Path) -> None:
    """409 is no failure."""
    (name,) = write_adapters(tmp_path / "adapters", 1)
    async with running_quill() as quill, fronted(quill, tmp_path) as served:
        quill.loaded[engine_name(served, name)] = str(tmp_path / "adapters" / name)
        assert (await completed(served, name))["choices"][0]["text"] == words_of(tmp_path / "adapters" / name)


async def test_backends_check(tmp_path: Path) -> None:
    config, base = tmp_path / "sidecar.yaml", tmp_path / "config.json"
    base.write_text(json.dumps(TINY))
    (tmp_path / "shared").mkdir()
    async with running_quill() as quill:
        entry = entry_of(quill, tmp_path) | {"base_model": {"name": BASE, "config": str(base)}}
        config.write_text(yaml.safe_dump({"backends": [entry]}))
        code, out, error = await sidecar("backends", "check", "quill-0", "--config", str(config))
        assert (code, error) == (0, ""), out
        assert "✓ reachable       Quill 1.4.2" in out
        assert "✓ adapter         staged, loaded in" in out
        assert "/v1/" not in out
        assert quill.loaded == {}
        quill.is_dead = True
        code, out, _ = await sidecar("backends", "check", "quill-0", "--config", str(config))
        assert code == 1, out
