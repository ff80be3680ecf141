"""OpenAI requests to trtllm-serve: its bytes as they come, its fields, and lengths that a client leaves open."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.core.events import RunFailed
from sidecar.core.facts import packed_key, task_id_of
from tests.kit.cases import first
from tests.kit.serving import Serving, place_of, serving, write_adapters
from tests.kit.trtllm_emulated import Client, running_trtllm
from tests.kit.trtllm_served import entry_of, fronted
from tests.kit.vllm_emulated import running_vllm

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DUMMY: dict[str, Any] = {"compute": "none", "max_loras": 2, "max_cpu_loras": 4, "seats": 32}
SAYS = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0}
ASKS = {"prompt": "hello", "max_tokens": 5, "temperature": 0}


@asynccontextmanager
async def one(folder: Path, **record: Any) -> AsyncIterator[tuple[Serving, Client, httpx.AsyncClient]]:
    """Run an engine and a sidecar with the adapter `a00`; yield clients of the engine and of the sidecar."""
    write_adapters(folder / "adapters", 1)
    options = DUMMY | record.pop("options", {})
    async with running_trtllm(**options) as (engine, direct), fronted([engine], folder, **record) as served:
        base_url = f"http://{served.sidecar.http_address}"
        async with httpx.AsyncClient(base_url=base_url, timeout=60) as client:
            yield served, direct, client


def lora_of(served: Serving, folder: Path) -> dict[str, Any]:
    """Return the field by which the sidecar names `a00` to the engine."""
    backend = next(iter(served.state.backends.values()))
    key = packed_key(served.state.names["a00"].digest, backend.facts.layout.for_modules(()))
    return {"lora_name": "a", "lora_int_id": task_id_of(key), "lora_path": str(folder / "shared" / key)}


def without_counters(body: bytes) -> bytes:
    """Return an answer without what no two answers have in common: its id, and when it was made."""
    return re.sub(rb'"created":\d+', b'"created":0', re.sub(rb'"id":"(chat)?cmpl-[^"]*"', b'"id":""', body))


@pytest.mark.parametrize("era", first(1, ["1.2", "main"]))
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, ASKS),
        (COMPLETIONS, ASKS | {"stream": True}),
        (COMPLETIONS, ASKS | {"stream": True, "stream_options": {"include_usage": True}}),
        (COMPLETIONS, ASKS | {"n": 2, "logprobs": 1}),
        (COMPLETIONS, {"prompt": [3, 4, 5], "max_tokens": 3, "detokenize": False}),
        (CHAT, SAYS),
        (CHAT, SAYS | {"stream": True}),
        (CHAT, SAYS | {"stream": True, "stream_options": {}}),
        (CHAT, SAYS | {"max_tokens": 100_000_000}),
        (COMPLETIONS, ASKS | {"temperature": "hot"}),
        (COMPLETIONS, ASKS | {"prompt": [10**9]}),
    ],
)
async def test_an_answer_is_the_engines_own_bytes(era: str, path: str, body: dict[str, Any], tmp_path: Path) -> None:
    """With the client's name for the model, and errors in the server's own form."""
    async with one(tmp_path, options={"era": era}) as (served, direct, client):
        through = await client.post(path, json={"model": "a00"} | body)
        own = {"lora_request": lora_of(served, tmp_path)}
        straight = await direct.http.post(path, json={"model": "a00"} | body | own)
        assert through.status_code == straight.status_code
        assert without_counters(through.content) == without_counters(straight.content)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("member", ["structured_outputs", "return_token_ids", "lora_request", "disaggregated_params"])
async def test_what_it_does_not_know_is_refused_by_name(path: str, member: str, tmp_path: Path) -> None:
    async with one(tmp_path) as (_, direct, client):
        before = (await direct.state())["iterations"]
        answer = await client.post(path, json={"model": "a00", member: {}} | (SAYS if path == CHAT else ASKS))
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == member
        assert (await direct.state())["iterations"] == before


@pytest.mark.parametrize("era", ["1.2", "main"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "MY SECRET", "suffix": "x"}),
        (COMPLETIONS, {"prompt": "MY SECRET", "user": {"a": 1}}),
        (CHAT, {"messages": [{"role": "user", "content": {"MY SECRET": 1}}]}),
    ],
)
async def test_a_quoted_request_tells_neither_what_was_added_nor_the_prompt_in_the_log(
    era: str, path: str, body: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A failed validation quotes all of a body: the client gets back its own part, and the log none of it."""
    caplog.set_level("INFO")
    async with one(tmp_path, options={"era": era}) as (served, _, client):
        answer = await client.post(path, json={"model": "a00"} | body)
        assert answer.status_code == 400
        lora = lora_of(served, tmp_path)
        for told in ("lora_request", str(lora["lora_int_id"]), lora["lora_path"]):
            assert told not in answer.text
        failed = [event for event in served.recorder.events if isinstance(event, RunFailed)]
        assert failed
        assert "validation error" in failed[0].text
        assert "SECRET" not in failed[0].text
        assert "SECRET" not in caplog.text


async def test_an_escaped_name_of_a_member_is_the_same_member(tmp_path: Path) -> None:
    async with one(tmp_path) as (_, _, client):
        body = b'{"model":"a00","prompt":"x","lora_\\u0072equest":{"lora_name":"x","lora_int_id":1,"lora_path":"/"}}'
        answer = await client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_request")


@pytest.mark.parametrize(
    ("queue", "headers", "tokens"),
    [
        ({}, {}, None),
        ({"classes": {"batch": {"max_tokens": 7}}}, {"x-lora-class": "batch"}, 7),
        ({"classes": {"batch": {"max_tokens": 7}}}, {}, None),
        ({"tenant_max_tokens": {"red": 5}, "classes": {"default": {"max_tokens": 9}}}, {"x-lora-tenant": "red"}, 5),
        ({"tenant_max_tokens": {"red": 5}, "classes": {"default": {"max_tokens": 9}}}, {}, 9),
    ],
)
async def test_a_request_without_a_length_says_what_it_gets(
    queue: dict[str, Any], headers: dict[str, str], tokens: int | None, tmp_path: Path
) -> None:
    """The rest of the context, or the least default of its tenant and class."""
    context = 40
    async with one(tmp_path, queue=queue, options={"max_seq_tokens": context}) as (_, _, client):
        body = {"model": "a00", "prompt": [3, 4, 5], "ignore_eos": True, "detokenize": False}
        answer = await client.post(COMPLETIONS, json=body, headers=headers)
        assert answer.headers["x-lora-max-tokens"] == ("context" if tokens is None else str(tokens))
        used = answer.json()["usage"]["completion_tokens"]
        assert used == (context - 3 if tokens is None else tokens)
        said = await client.post(COMPLETIONS, json=body | {"max_tokens": 4}, headers=headers)
        assert "x-lora-max-tokens" not in said.headers
        assert said.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("path", "nulls"),
    [
        (COMPLETIONS, '"max_tokens":null,'),
        (CHAT, '"max_tokens":null,'),
        (CHAT, '"max_completion_tokens":null,'),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
async def test_a_length_that_is_null_is_none(path: str, nulls: str, is_first: bool, tmp_path: Path) -> None:
    """Two members of one name would be read differently by different parsers."""
    async with one(tmp_path, queue={"classes": {"default": {"max_tokens": 6}}}) as (_, _, client):
        asks = '"messages":[{"role":"user","content":"é"}]' if path == CHAT else '"prompt":"é"'
        body = f'"model":"a00",{asks},"ignore_eos":true'
        body = f"{{{nulls}{body}}}" if is_first else f"{{{body},{nulls.rstrip(',')}}}"
        answer = await client.post(path, content=body.encode(), headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-lora-max-tokens"] == "6"
        assert answer.json()["usage"]["completion_tokens"] == 6


async def test_a_mixed_pool_sends_a_request_to_an_engine_that_knows_its_members(tmp_path: Path) -> None:
    """trtllm-serve would refuse it, so vLLM answers whatever is resident where."""
    write_adapters(tmp_path / "adapters", 1)
    async with AsyncExitStack() as stack:
        trtllm, _ = await stack.enter_async_context(running_trtllm(**DUMMY))
        vllm, _ = await stack.enter_async_context(running_vllm(compute="none", max_loras=2, max_cpu_loras=4))
        shared = {"adapters_dir": str(tmp_path / "shared")}
        entries = [place_of(trtllm, 0) | entry_of(tmp_path), place_of(vllm, 1) | shared]
        served = await stack.enter_async_context(serving([], tmp_path / "adapters", backends=entries))
        base_url = f"http://{served.sidecar.http_address}"
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=base_url, timeout=60))
        for member in ({"return_token_ids": True}, {"detokenize": True}):
            answer = await client.post(COMPLETIONS, json={"model": "a00"} | ASKS | member)
            assert answer.status_code == 200
            if "return_token_ids" in member:
                assert answer.headers["x-lora-backend"] == "vllm-1"
