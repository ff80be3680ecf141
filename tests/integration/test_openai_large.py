"""Large requests by the OpenAI API: read in another process, answered like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.fronts.openai.large import LARGE_BYTES
from tests.integration.test_openai_relay import COMPLETIONS, ask
from tests.integration.test_openai_triton import CHAT, TEMPLATE, client_of, in_front
from tests.integration.test_vllm import answer_of, fronted
from tests.kit.openai_house import House, ScriptedVllm, event, house
from tests.kit.serving import until, write_adapters
from tests.kit.vllm_emulated import running_vllm

PADDING = "x" * (2 * LARGE_BYTES)


def reader_of(served: House) -> int | None:
    """Return the id of the process that reads for a house."""
    api: Any = served.front._api
    pid: int | None = api.large_bodies.pid
    return pid


async def test_only_large_bodies_are_read_elsewhere(tmp_path: Path) -> None:
    """One that is a byte too long is; both go on as they came."""
    engine = ScriptedVllm()
    before, after = b'{"max_tokens":3,"prompt":"', b'", "model" :"base" }\n'
    at_most = before + b"x" * (LARGE_BYTES - len(before) - len(after)) + after
    async with house(tmp_path, [engine]) as served:
        for body, is_read_here in ((at_most, True), (b"\n" + at_most, False)):
            asking = ask(served, body)
            await engine.running_are(1)
            engine.deliver(event("a"), final=True)
            assert (await asking).status_code == 200
            form = engine.forms[-1]
            assert form.before + b'"base"' + form.after == body
            assert (reader_of(served) is None) is is_read_here
        refused = await ask(served, b"\n" + at_most.replace(b"base", b"bose"))
        assert (refused.status_code, refused.json()["error"]["reason"]) == (404, "model_not_found")
        refused = await ask(served, b"\n" + at_most.replace(b":3", b":-"))
        assert (refused.status_code, refused.json()["error"]["reason"]) == (400, "invalid_request")


async def test_admission_counts_what_a_large_body_asks(tmp_path: Path) -> None:
    """As it does of a small one."""
    engine = ScriptedVllm(seats=2)
    async with house(tmp_path, [engine]) as served:
        running = ask(served, {"n": 2})
        await engine.running_are(1)
        waiting = ask(served, {"prompt": [7] * LARGE_BYTES, "max_tokens": 10, "n": 2})
        await until(lambda: served.gateway.state.waiting.requests == 1)
        # The prompt alone is longer than engines are taken to be: of each answer one token counts.
        assert served.gateway.state.waiting.tokens == LARGE_BYTES + 2
        waiting.cancel()
        engine.deliver(event("a"), final=True)
        await running


async def test_a_vllm_answers_a_large_request(tmp_path: Path) -> None:
    """Which comes to it whole, under its own name for the adapter."""
    (name,) = write_adapters(tmp_path / "adapters", 1)
    async with running_vllm(compute="none") as (engine, _), fronted([engine], tmp_path) as served:
        body = {"model": name, "prompt": "hello", "max_tokens": 4, "temperature": 0, "return_token_ids": True}
        async with client_of(served) as client:
            response = await client.post(COMPLETIONS, json=body | {"metadata": {"padding": PADDING}})
        assert response.json()["choices"][0]["token_ids"] == answer_of(served, tmp_path, name)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_triton_answers_a_large_request(tmp_path: Path, path: str) -> None:
    """Its text is written in the other process, its template filled in there."""
    async with in_front(tmp_path, TEMPLATE, compute="llama") as (_, _, client):
        small = {"prompt": "hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}

        async def answer(**more: Any) -> httpx.Response:
            body = {"model": "a00", "max_tokens": 12, "temperature": 0, **small, **more}
            response: httpx.Response = await client.post(path, content=json.dumps(body).encode())
            return response

        answers = [(await answer(**more)).json()["choices"] for more in ({}, {"metadata": {"padding": PADDING}})]
        assert answers[0] == answers[1]
        refused = await answer(logit_bias={"1": PADDING})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "logit_bias")
