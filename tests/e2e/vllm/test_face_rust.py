"""vLLM's Rust front end, the real one and the emulated: calls for adapters, bodies, streams, metrics."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx

from tests.e2e.vllm.direct import complete, completion, http_client, load, registered, unload
from tests.e2e.vllm.faces import Face, events_of

PREFIXES = "VLLM_RUNTIME_LORA_ALLOWED_PATH_PREFIXES"
PROMPT = [3, 4, 5]
USER = [{"role": "user", "content": "hi"}]


def told(reply: httpx.Response) -> tuple[int, str, str | None, str]:
    """Return an error's status, type, parameter and message."""
    error = reply.json()["error"]
    assert (list(error), error["code"]) == (["message", "type", "param", "code"], reply.status_code)
    return reply.status_code, error["type"], error["param"], error["message"]


def bad(message: str, param: str | None) -> tuple[int, str, str | None, str]:
    return 400, "BadRequestError", param, message


async def test_calls(rust_face: Face) -> None:
    """A repeat, a missing adapter, paths that it does not take: each has words of its own."""
    path = rust_face.adapter()
    async with http_client(rust_face.address) as client:
        loaded = await load(client, "sql", path)
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'sql' added successfully.")
        assert loaded.headers["content-type"] == "text/plain; charset=utf-8"
        again = (
            "LoRA adapter `sql` is already loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to true."
        )
        assert told(await load(client, "sql", path)) == bad(again, "lora_name")
        assert told(await load(client, "", path)) == bad("lora_name must not be empty", None)
        assert told(await load(client, "x", "")) == bad("lora_path must not be empty", None)
        base = "LoRA adapter `base` conflicts with a served base model"
        assert told(await load(client, "base", path)) == bad(base, "lora_name")
        missing = "Local LoRA adapter path must exist and be accessible."
        assert told(await load(client, "x", rust_face.folder / "none")) == bad(missing, "lora_path")
        outside = "Local LoRA adapter path is outside the configured allowed prefixes."
        assert told(await load(client, "x", "/usr")) == bad(outside, "lora_path")
        relative = f"Local LoRA adapter paths must be absolute and under one of the prefixes configured by {PREFIXES}."
        assert told(await load(client, "x", "../x")) == bad(relative, "lora_path")
        (rust_face.folder / "empty").mkdir()
        status, kind, _, message = told(await load(client, "x", rust_face.folder / "empty"))
        assert (status, kind) == (500, "InternalServerError")
        assert re.fullmatch(
            r"failed to load LoRA adapter `x`: utility call `add_lora` failed \(call_id=\d+\): Call to add_lora method "
            r"failed: Worker failed with error 'Loading lora x failed: No adapter found for "
            rf"{rust_face.folder}/empty', "
            r"please check the stack trace above for the root cause",
            message,
        )
        unknown = 404, "NotFoundError", "model", "The model `x` does not exist."
        assert told(await unload(client, "x")) == unknown
        assert told(await client.post("/v1/completions", json=completion("x", PROMPT, 1))) == unknown
        assert (await client.get("/health")).status_code == 200
        assert await registered(client) == {"sql": str(path)}


async def test_removal(rust_face: Face) -> None:
    """It takes an adapter out of the engine's memory; one that has left it stays named until it is brought back."""
    paths = [rust_face.adapter(seed) for seed in range(6)]
    async with http_client(rust_face.address) as client:
        for number, path in enumerate(paths):
            (await load(client, f"m{number}", path)).raise_for_status()
        status, kind, _, message = told(await unload(client, "m0"))
        assert (status, kind) == (500, "InternalServerError")
        assert re.fullmatch(r"engine rejected removal of LoRA adapter `m0` with id \d+", message)
        assert "m0" in await registered(client)
        (await load(client, "m0", paths[0], load_inplace=True)).raise_for_status()
        (await unload(client, "m0")).raise_for_status()
        assert (await unload(client, "m1")).status_code == 500
        assert len(await complete(client, "m1", PROMPT, 2)) == 2
        (await unload(client, "m1")).raise_for_status()
        assert set(await registered(client)) == {"m2", "m3", "m4", "m5"}


async def test_whole_answers(rust_face: Face) -> None:
    """Member by member."""
    async with http_client(rust_face.address) as client:
        body = completion("base", PROMPT, 3)
        answer = (await client.post("/v1/completions", json=body)).json()
        choice = answer["choices"][0]
        assert keys(answer) == (
            "id object created model choices usage metrics system_fingerprint kv_transfer_params ec_transfer_params"
        )
        assert keys(choice) == (
            "index text logprobs finish_reason stop_reason prompt_logprobs token_ids prompt_token_ids"
        )
        assert (choice["prompt_token_ids"], choice["finish_reason"], len(choice["token_ids"])) == (PROMPT, "length", 3)
        assert answer["usage"] == {
            "prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3, "prompt_tokens_details": None,
            "completion_tokens_details": {"reasoning_tokens": 0},
        }  # fmt: skip
        fields: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
        chat = (await client.post("/v1/chat/completions", json={"model": "base", "messages": USER} | fields)).json()
        assert keys(chat) == (
            "id object created model choices service_tier usage metrics system_fingerprint prompt_logprobs "
            "prompt_token_ids prompt_text kv_transfer_params ec_transfer_params"
        )
        assert keys(chat["choices"][0]) == (
            "index message logprobs finish_reason stop_reason token_ids routed_experts weight_versions"
        )
        many = await client.post("/v1/completions", json=body | {"n": 2, "temperature": 1})
        assert told(many) == bad("Only n=1 is supported.", "n")


def keys(record: dict[str, Any]) -> str:
    return " ".join(record)


async def test_streams(rust_face: Face) -> None:
    """What begins and what ends one has no token; with ids, usage, both or neither."""
    async with http_client(rust_face.address) as client:
        for ids in (False, True):
            body = completion("base", PROMPT, 3, stream=True, return_token_ids=ids)
            body |= {"stream_options": {"include_usage": True, "continuous_usage_stats": ids}}
            *chunks, usage, done = events_of((await client.post("/v1/completions", json=body)).text)
            choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
            assert (done, json.loads(usage)["usage"]["completion_tokens"]) == ("[DONE]", 3)
            assert [keys(choice) for choice in choices] == (
                ["index text token_ids prompt_token_ids", *["index text token_ids"] * 3,
                 "index text finish_reason token_ids"]
                if ids
                else [*["index text"] * 3, "index text finish_reason"]
            )  # fmt: skip
            if ids:
                assert [len(choice["token_ids"]) for choice in choices] == [0, 1, 1, 1, 0]
                assert [json.loads(chunk)["usage"]["completion_tokens"] for chunk in chunks][-2:] == [3, 3]
        chat = {
            "model": "base",
            "messages": USER,
            "max_tokens": 3,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        first, *_, last, done = events_of((await client.post("/v1/chat/completions", json=chat)).text)
        assert json.loads(first)["choices"] == [{"index": 0, "delta": {"role": "assistant"}}]
        assert json.loads(last)["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
        assert keys(json.loads(first)) == "id object created model choices"


async def test_models_and_metrics(rust_face: Face) -> None:
    """Who it is; what it does not publish."""
    async with http_client(rust_face.address) as client:
        version = (await client.get("/version")).json()
        assert version == {"version": "0.33.0", "rust_frontend_version": "0.33.0"}
        (base,) = (await client.get("/v1/models")).json()["data"]
        assert keys(base) == "id object created owned_by root parent max_model_len"
        assert (base["owned_by"], base["parent"]) == ("vllm-frontend-rs", None)
        await complete(client, "base", PROMPT, 2)
        text = (await client.get("/metrics")).text
        assert re.search(r"^vllm:iteration_tokens_total_count\{[^}]*\} \d", text, re.M)
        for name in ("cache_config_info", "process_start_time_seconds", 'max_lora="'):
            assert name not in text
