"""A dialect that rests on no other server's: what is usual is enough to serve it, and to check it."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import grpc.aio
import httpx
import pytest
import yaml

from sidecar.backends import registry
from sidecar.core.effects import Heal
from sidecar.proto import admin_pb2
from tests.integration.test_backends_check_cli import sidecar
from tests.integration.test_backends_check_vllm_cli import TINY
from tests.kit import quill as quill_dialect
from tests.kit.fake_quill import BASE, FakeQuill, ids_of, running_quill, words_of
from tests.kit.quill import Quill
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


@pytest.mark.parametrize("style", ["compact", "spaced", "crlf"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_events_however_a_server_writes_them(
    style: Literal["compact", "spaced", "crlf"], path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With spaces in their JSON, or lines that end as in HTTP: each has its tokens, and no begun answer is repeated."""
    caplog.set_level(logging.INFO, "sidecar.requests")
    (name,) = write_adapters(tmp_path / "adapters", 1)
    words = words_of(tmp_path / "adapters" / name)
    body = {"model": name, "prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 8}
    del body["messages" if path == "/v1/completions" else "prompt"]
    async with running_quill() as quill, fronted(quill, tmp_path) as served:
        quill.style = style
        async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False) as http:
            whole = (await http.post(path, json=body | {"stream": True})).text
            quill.dies_in_streams = True
            begun = (await http.post(path, json=body | {"stream": True})).text
            await until(lambda: sum("request ended" in line for line in caplog.messages) == 2)
    assert _text_in(whole) == words
    assert (_text_in(begun), "error" in begun) == (words[0], True)
    counts = [f"output_tokens={count} " for count in (len(words), 1)]
    ended = [line for line in caplog.messages if "request ended" in line]
    assert [count in line for count, line in zip(counts, ended, strict=True)] == [True, True], ended


def _text_in(stream: str) -> str:
    """Return the text of a stream's events."""
    events = [line.removeprefix("data:").strip() for line in stream.splitlines() if line.startswith("data:")]
    choices = [choice for event in events if event != "[DONE]" for choice in json.loads(event).get("choices", [])]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content", "") for choice in choices)


async def test_a_dialect_that_fails_ends_a_request_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code runs in the sidecar's own process."""
    (name,) = write_adapters(tmp_path / "adapters", 1)

    def model_name(self: Quill, base: str, name: str) -> str:
        raise KeyError(name)

    monkeypatch.setattr(Quill, "model_name", model_name)
    async with running_quill() as quill, fronted(quill, tmp_path) as served:
        async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False) as http:
            answer = await http.post("/v1/completions", json={"model": name, "prompt": "a"})
        assert (answer.status_code, "the sidecar failed" in answer.text) == (500, True), answer.text
        assert (await completed(served, BASE))["choices"][0]["text"] == words_of(None)


async def test_a_path_that_the_server_lacks_is_not_tried(tmp_path: Path) -> None:
    (name,) = write_adapters(tmp_path / "adapters", 1)
    async with running_quill() as quill, fronted(quill, tmp_path) as served:
        async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False) as http:
            answer = await http.post("/v1/embeddings", json={"model": name, "input": "a"})
        assert (answer.status_code, "does not have this path" in answer.text) == (501, True), answer.text
        assert not quill.loaded


async def test_a_dialect_whose_model_has_no_asking_can_be_asked_nothing_by_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command says so; its clients are answered."""
    (name,) = write_adapters(tmp_path / "adapters", 1)
    monkeypatch.setattr(Quill, "model", replace(Quill.model, asking=None))
    monkeypatch.setattr(quill_dialect, "DIALECT", Quill())
    async with running_quill() as quill, fronted(quill, tmp_path) as served:
        verified = [step async for step in served.adapters.Verify(admin_pb2.VerifyRequest(name=name))]
        failed = [step.check.sentence for step in verified if step.check.result == "failed"]
        assert any("the sidecar failed to send it; its log says why" in sentence for sentence in failed), verified
        assert (await completed(served, name))["choices"][0]["text"] == words_of(tmp_path / "adapters" / name)


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
        assert quill.removals


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
