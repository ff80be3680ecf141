"""The right tokens: through the sidecar comes what PEFT answers, and what SGLang answers that is asked directly."""

from __future__ import annotations

import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.core.effects import Load
from tests.e2e.sglang.fronted import in_front, load
from tests.e2e.sglang.server import SglangServer
from tests.e2e.vllm.direct import at_once, complete, http_client
from tests.e2e.vllm.faces import events_of
from tests.e2e.vllm.fronted import ask
from tests.e2e.vllm.toy import NAMES, Toy, all_different, prompt
from tests.kit.faults import assert_nothing_left

ASKED = NAMES[:12]
PROMPTS = [prompt(1, 9), prompt(2, 40)]
TOKENS = 8
REQUESTS = 300
CHAT = [{"role": "user", "content": "def quicksort(items):"}]


async def chat(client: httpx.AsyncClient, model: str, stream: bool) -> str:
    """Return the text of a chat's answer."""
    body = {"model": model, "messages": CHAT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    reply = await client.post("/v1/chat/completions", json=body | {"stream": stream})
    assert reply.status_code == httpx.codes.OK, reply.text
    if not stream:
        return str(reply.json()["choices"][0]["message"]["content"])
    events = [json.loads(event) for event in events_of(reply.text) if event != "[DONE]"]
    assert {event["model"] for event in events} == {model}
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])


async def direct_answers(server: SglangServer, toy: Toy) -> dict[tuple[str, int], Any]:
    """Return what SGLang itself answers, by name and question; those to token ids equal PEFT's."""
    found: dict[tuple[str, int], Any] = {}
    async with http_client(server.http_address) as client:
        for name in ["base", *ASKED]:
            if name != "base":
                await load(client, name, toy.adapters / name)
            model = name if name == "base" else f"base:{name}"
            for number, asked in enumerate(PROMPTS):
                found[name, number] = await complete(client, model, asked, TOKENS)
                assert found[name, number] == toy.greedy(
                    None if name == "base" else toy.adapters / name, asked, TOKENS
                ), f"SGLang and PEFT differ about {name}"
            found[name, len(PROMPTS)] = await chat(client, model, stream=False)
            if name != "base":
                await client.post("/unload_lora_adapter", json={"lora_name": name})
    assert all_different([tokens for (_, number), tokens in found.items() if number == 0])
    return found


@pytest.mark.parametrize("way", ["sent", "read from files"])
async def test_every_answer_is_the_right_one(server: SglangServer, toy: Toy, tmp_path: Path, way: str) -> None:
    """300 requests for 12 adapters and the base model, over three slots and eight places in memory, 16 at a time."""
    wanted = await direct_answers(server, toy)
    fields = {} if way == "sent" else {"adapters_dir": str(tmp_path / "shared")}
    async with in_front(server, toy, tmp_path, **fields) as front:
        wrong: list[str] = []

        async def one(name: str, number: int, stream: bool) -> None:
            answer: Any
            if number == len(PROMPTS):
                answer = await chat(front.client, name, stream)
            else:
                told = await ask(front.client, name, PROMPTS[number], TOKENS, stream)
                assert (told.status, told.error, told.whole) == (200, "", True), told
                answer = told.tokens
            if answer != wanted[name, number]:
                wrong.append(f"{name}, question {number}: {answer} and not {wanted[name, number]}")

        keys = random.Random(7).choices(list(wanted), k=REQUESTS)
        asks: list[Callable[[], Awaitable[None]]] = [
            lambda key=key, stream=bool(number % 2): one(*key, stream) for number, key in enumerate(keys)
        ]
        await at_once(16, asks)
        assert wrong == []
        assert front.served.recorder.count(Load) > len(ASKED), "no adapter has left the engine"
        await assert_nothing_left(front.served)
    async with http_client(server.http_address) as client:
        assert len((await client.get("/v1/models")).json()["data"]) == 1, "adapters are left in the engine"
