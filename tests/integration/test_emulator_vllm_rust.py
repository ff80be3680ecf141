"""The emulated vLLM 0.33 and its Rust front end: words, paths, memory and metrics, as the real ones had them."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sidecar.lab.engine.openai import VllmOptions
from tests.kit.peft_files import write_adapter
from tests.kit.serving import until
from tests.kit.vllm_emulated import BASE, DONE, Client, expected, running_vllm, start_vllm

DUMMY = {"compute": "none", "max_loras": 2, "max_cpu_loras": 4, "vllm_version": "0.33.0"}
NOTHING_ENDS = {"max_seq_tokens": 1_000_000, "kv_blocks": 10_000}
PREFIXES = "VLLM_RUNTIME_LORA_ALLOWED_PATH_PREFIXES"
DIED = "The server had an error while processing your request."
RUST_DIED = "engine-core error: engine core reported fatal failure"


def rust(folder: Path, **options: Any) -> dict[str, Any]:
    """Return the options of a Rust front end that loads from a folder."""
    return {**DUMMY, "rust_frontend": True, "allowed_prefix": (str(folder),), **options}


def error(text: str, code: int = 400, param: str | None = None, kind: str = "BadRequestError") -> dict[str, Any]:
    return {"error": {"message": text, "type": kind, "param": param, "code": code}}


def failed(text: str) -> dict[str, Any]:
    return error(text, 500, kind="InternalServerError")


async def load_all(client: Client, folder: Path, count: int) -> list[Path]:
    """Load adapters m0, m1, … of different seeds."""
    paths = [write_adapter(folder / f"m{number}", seed=number) for number in range(count)]
    for number, path in enumerate(paths):
        assert (await client.load(f"m{number}", path)).status_code == 200
    return paths


async def test_who_it_says_it_is(tmp_path: Path) -> None:
    """The version tells the Rust front end, and so does each model's owner."""
    async with running_vllm(**DUMMY) as (_, client):
        assert (await client.http.get("/version")).json() == {"version": "0.33.0"}
    async with running_vllm(**rust(tmp_path)) as (_, client):
        told = (await client.http.get("/version")).json()
        assert told == {"version": "0.33.0", "rust_frontend_version": "0.33.0"}
        card = (await client.models())[BASE]
        assert card["owned_by"] == "vllm-frontend-rs"
        assert "permission" not in card
        assert (await client.http.get("/ping")).status_code == 404
    with pytest.raises(ValueError, match=r"vllm_version 0\.31"):
        VllmOptions(vllm_version="0.31")


async def test_calls(tmp_path: Path) -> None:
    """Success is text; each refusal has its words, and names the field."""
    (path,) = [write_adapter(tmp_path / "in" / "a")]
    outside, beside = write_adapter(tmp_path / "out"), write_adapter(tmp_path / "in2" / "a")
    (tmp_path / "in" / "leads-out").symlink_to(outside)
    (tmp_path / "leads-in").symlink_to(path)
    (tmp_path / "in" / "empty").mkdir()
    async with running_vllm(**rust(tmp_path / "in")) as (_, client):
        loaded = await client.load("a", path)
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'a' added successfully.")
        assert loaded.headers["content-type"] == "text/plain; charset=utf-8"
        again = (
            "LoRA adapter `a` is already loaded. If you want to load the adapter in place, set 'load_inplace' to true."
        )
        is_out = "Local LoRA adapter path is outside the configured allowed prefixes."
        relative = f"Local LoRA adapter paths must be absolute and under one of the prefixes configured by {PREFIXES}."
        not_there = "Local LoRA adapter path must exist and be accessible."
        for name, where, text, param in (
            ("a", path, again, "lora_name"),
            ("", path, "lora_name must not be empty", None),
            ("x", "", "lora_path must not be empty", None),
            (BASE, path, "LoRA adapter `base` conflicts with a served base model", "lora_name"),
            ("x", outside, is_out, "lora_path"),
            ("x", beside, is_out, "lora_path"),
            ("x", tmp_path / "in" / "leads-out", is_out, "lora_path"),
            ("x", tmp_path / "in" / "none", not_there, "lora_path"),
            ("x", "../x", relative, "lora_path"),
        ):
            refused = await client.load(name, where)
            assert (refused.status_code, refused.json()) == (400, error(text, param=param)), (name, where)
        none = await client.load("x", tmp_path / "in" / "empty")
        assert none.status_code == 500
        assert none.json()["error"]["message"].startswith(
            "failed to load LoRA adapter `x`: utility call `add_lora` failed (call_id="
        )
        assert f"'Loading lora x failed: No adapter found for {tmp_path / 'in' / 'empty'}'" in none.text
        assert (await client.load("link", tmp_path / "leads-in")).status_code == 200
        assert (await client.models())["link"]["root"] == str(path)
        unknown = error("The model `x` does not exist.", 404, "model", "NotFoundError")
        for refused in (await client.unload("x"), await client.complete("x")):
            assert (refused.status_code, refused.json()) == (404, unknown)


async def test_prefixes_that_load_nothing(tmp_path: Path) -> None:
    """Without any, no local path; with one that does not exist, none either, and that is a 500."""
    path = write_adapter(tmp_path / "a")
    async with running_vllm(**rust(tmp_path) | {"allowed_prefix": ()}) as (_, client):
        refused = await client.load("a", path)
        text = f"Local LoRA adapter paths require {PREFIXES} to be configured."
        assert (refused.status_code, refused.json()) == (400, error(text, param="lora_path"))
    prefixes = (str(tmp_path), str(tmp_path / "none"))
    async with running_vllm(**rust(tmp_path) | {"allowed_prefix": prefixes}) as (_, client):
        refused = await client.load("a", path)
        assert (refused.status_code, refused.json()) == (
            500,
            failed(f"configured {PREFIXES} path prefix must exist and be accessible"),
        )


async def test_unloading_removes(tmp_path: Path) -> None:
    """Slot and copy are free; what has left the memory cannot be removed, until something brings it back."""
    async with running_vllm(**rust(tmp_path)) as (server, client):
        paths = await load_all(client, tmp_path, 6)
        assert server.engine.counters.host_pages_used == 4
        assert (await client.unload("m5")).status_code == 200
        assert server.engine.counters.host_pages_used == 3
        refused = await client.unload("m0")
        text = "engine rejected removal of LoRA adapter `m0` with id 1"
        assert (refused.status_code, refused.json()) == (500, failed(text))
        assert "m0" in await client.models()
        assert (await client.load("m0", paths[0], load_inplace=True)).status_code == 200
        assert (await client.unload("m0")).status_code == 200
        assert (await client.unload("m1")).status_code == 500
        assert await client.tokens("m1") == expected("m1", paths[1], 4)
        assert (await client.unload("m1")).status_code == 200
        assert not {"m0", "m1", "m5"} & set(await client.models())


async def test_unloading_under_way(tmp_path: Path) -> None:
    """The next step reads it again, and the request ends right; without the files it is the engine's end."""
    async with running_vllm(**rust(tmp_path) | NOTHING_ENDS) as (server, client):
        (path,) = await load_all(client, tmp_path, 1)
        running = asyncio.create_task(client.tokens("m0", tokens=3_000))
        await until(lambda: server.engine.counters.active == 1)
        assert (await client.unload("m0")).status_code == 200
        assert await running == expected("m0", path, 3_000)
        assert server.engine.counters.host_pages_used == 1
    server = await start_vllm(**rust(tmp_path) | NOTHING_ENDS)
    async with Client(server.http_address) as client:
        (path,) = await load_all(client, tmp_path, 1)
        ending = asyncio.create_task(client.complete("m0", tokens=900_000))
        await until(lambda: server.engine.counters.active == 1)
        shutil.rmtree(path)
        assert (await client.unload("m0")).status_code in (200, 500)
        assert (await ending).json() == failed(f"completion stream failed: {RUST_DIED}")
        with pytest.raises(RuntimeError, match="adapter m0 was to be read again"):
            await server.failed()
    await server.stop()


async def test_deaths(tmp_path: Path) -> None:
    """The Python server has one text for a client and its end; the Rust front end three, and it lingers."""
    for options, whole, late in (
        (DUMMY, DIED, DIED),
        (rust(tmp_path), f"completion stream failed: {RUST_DIED}", f"failed to submit completion request: {RUST_DIED}"),
    ):
        server = await start_vllm(**options | NOTHING_ENDS)
        async with Client(server.http_address) as client:
            paths = await load_all(client, tmp_path, 6)
            shutil.rmtree(paths[0])
            telling = asyncio.create_task(client.completion_events(BASE, tokens=900_000))
            running = asyncio.create_task(client.complete(BASE, tokens=900_000))
            await until(lambda server=server: server.engine.counters.active == 2)  # type: ignore[misc]
            assert (await client.completion_events("m0"))[-2:] == [failed(RUST_DIED if late != DIED else DIED), DONE]
            assert (await telling)[-2] == failed(RUST_DIED if late != DIED else DIED)
            if late != DIED:
                for _ in range(2):
                    assert (await client.http.get("/health")).status_code == 503
                    assert (await client.complete(BASE)).json() == failed(late)
            assert (await running).json() == failed(whole)
            with pytest.raises(RuntimeError, match="adapter m0 was to be read again"):
                await server.failed()
        await server.stop()


async def test_loads_in_place(tmp_path: Path) -> None:
    """0.32 reads such an adapter again for every batch; 0.33 once."""
    for version, dies in (("0.32.0", True), ("0.33.0", False)):
        path = write_adapter(tmp_path / version, seed=1)
        server = await start_vllm(**DUMMY | {"vllm_version": version})
        async with Client(server.http_address) as client:
            for in_place in (False, True):
                assert (await client.load("a", path, load_inplace=in_place)).status_code == 200
            right = expected("a", path, 4)
            assert await client.tokens("a") == right
            shutil.rmtree(path)
            answer = await client.complete("a", return_token_ids=True)
            assert answer.status_code == (500 if dies else 200)
            assert dies or answer.json()["choices"][0]["token_ids"] == right
        await server.stop()


async def test_metrics(tmp_path: Path) -> None:
    """No slots, no KV size, no start; an adapter's name only while it runs."""
    async with running_vllm(**rust(tmp_path)) as (_, client):
        await client.tokens(BASE)
        text = (await client.http.get("/metrics")).text
        for name in ("max_lora", "cache_config_info", "process_start_time_seconds", "lora_requests_info{"):
            assert name not in text
        await load_all(client, tmp_path, 1)
        await client.tokens("m0")
        assert await client.sample("vllm:iteration_tokens_total_count") == 8
        running = (await client.samples("vllm:lora_requests_info")).keys()
        assert list(running) == [("m0", "")]


async def test_streams(tmp_path: Path) -> None:
    """A chat begins with the role, a first event has no ids, and the end of a choice has no token."""
    async with running_vllm(**rust(tmp_path)) as (_, client):
        events = await client.completion_events(BASE, tokens=2, return_token_ids=True, ignore_eos=True)
        choices = [event["choices"][0] for event in events[:-1]]
        first, second = expected("", None, 2)
        assert [choice["token_ids"] for choice in choices] == [[], [first], [second], []]
        assert choices[-1] == {"index": 0, "text": "", "finish_reason": "length", "token_ids": []}
        assert list(choices[0]) == ["index", "text", "token_ids", "prompt_token_ids"]
        plain = await client.completion_events(BASE, tokens=2, ignore_eos=True)
        assert [list(event["choices"][0]) for event in plain[:-1]] == [
            ["index", "text"], ["index", "text"], ["index", "text", "finish_reason"],
        ]  # fmt: skip
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": BASE, "messages": messages, "max_tokens": 2, "ignore_eos": True}
        chat = [event async for event in client.stream("/v1/chat/completions", **body)]
        assert chat[0]["choices"] == [{"index": 0, "delta": {"role": "assistant"}}]
        assert chat[-2]["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
        assert list(chat[0]) == ["id", "object", "created", "model", "choices"]


async def test_what_only_the_python_server_takes(tmp_path: Path) -> None:
    """More than one answer, more than one prompt; and no body of more than 32 MiB."""
    async with running_vllm(**rust(tmp_path)) as (_, client):
        many = await client.complete(BASE, n=2, best_of=2)
        assert (many.status_code, many.json()) == (400, error("Only n=1 is supported.", param="n"))
        prompts = await client.complete(BASE, [[1, 2], [3, 4]])
        assert (prompts.status_code, prompts.json()["error"]["type"]) == (400, "Bad Request")
        body = json.dumps({"model": BASE, "prompt": "a" * (33 << 20), "max_tokens": 1}).encode()
        large = await client.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert large.json()["error"]["message"] == "Failed to buffer the request body: length limit exceeded"
