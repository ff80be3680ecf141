"""A trainer's load calls in front of a real vLLM: its tokens after each step, and its statuses and texts."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.vllm.direct import http_client, registered
from tests.e2e.vllm.fronted import Front, ask, in_front
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import Toy, all_different, prompt, write_version
from tests.kit.serving import until

STEPS, IN_FLIGHT, TOKENS, KEPT = 6, 8, 8, 3
PROMPT = prompt(5, 150)
"""Longer than a KV block, so that every step meets the prefixes of those before it."""
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
JSON = {"content-type": "application/json"}


async def load(client: httpx.AsyncClient, path: Path, name: str = "policy", in_place: bool = True) -> httpx.Response:
    return await client.post(LOAD, json={"lora_name": name, "lora_path": str(path), "load_inplace": in_place})


async def test_each_step_answers_as_peft_does_and_what_was_asked_before_by_the_step_before(
    server: VllmServer, toy: Toy, tmp_path: Path
) -> None:
    """The trainer writes all steps into one folder, and rewrites it as soon as it has its answer."""
    steps = [write_version(tmp_path / f"step-{step}", step) for step in range(STEPS)]
    right = {f"policy@v{number}": toy.greedy(path, PROMPT, TOKENS) for number, path in enumerate(steps, 1)}
    assert all_different(right.values())
    async with in_front(server, None, tmp_path, openai={"load_calls": True, "versions_kept": KEPT}) as front:
        done = asyncio.Event()
        wrong: list[Any] = []
        asking: list[asyncio.Task[None]] = []
        latest = tmp_path / "latest"
        for number, path in enumerate(steps, 1):
            shutil.copytree(path, latest, dirs_exist_ok=True)
            reply = await load(front.client, latest)
            assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'policy' added successfully.")
            assert reply.headers["x-lora-version"] == f"policy@v{number}"
            told = await ask(front.client, "policy", PROMPT, TOKENS)
            assert (told.version, told.tokens) == (f"policy@v{number}", right[f"policy@v{number}"])
            if not asking:
                asking = [asyncio.create_task(keep_asking(front, done, right, wrong)) for _ in range(IN_FLIGHT)]
        done.set()
        await asyncio.gather(*asking)
        assert wrong == []
        record = front.served.sidecar.gateway.catalogue.known("policy")
        kept = {f"policy@{version.adapter.digest[:12]}" for version in record.versions}
        assert len(kept) == KEPT
        await forgotten_but(server, kept)
        assert (await front.client.post(UNLOAD, json={"lora_name": "policy"})).status_code == 200
        await forgotten_but(server, set())
        await until(lambda: list(front.shared.glob("[!.]*")) == [])


async def keep_asking(front: Front, done: asyncio.Event, right: dict[str, list[int]], wrong: list[Any]) -> None:
    names = front.served.state.names
    while not done.is_set():
        before = names["policy"].current
        told = await ask(front.client, "policy", PROMPT, TOKENS, stream=True)
        ordinal = int(told.version.removeprefix("policy@v") or -1)
        if told.tokens != right.get(told.version) or not before <= ordinal <= names["policy"].current:
            wrong.append((before, told))


async def forgotten_but(server: VllmServer, names: set[str]) -> None:
    """Wait until the server has none of our adapters but these."""
    async with http_client(server.http_address) as straight:
        found: list[set[str]] = [set()]

        async def look() -> None:
            while True:
                found[0] = set(await registered(straight))
                if found[0] <= names:
                    return

        async with asyncio.timeout(60):
            await look()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (LOAD, b"{"),
        (LOAD, b"[]"),
        (LOAD, b'{"lora_path": "/tmp"}'),
        (LOAD, b'{"lora_name": 7, "lora_path": "/tmp"}'),
        (LOAD, b'{"lora_name": "x", "lora_path": "/tmp", "load_inplace": "often"}'),
        (LOAD, b'{"lora_name": "", "lora_path": "/tmp"}'),
        (LOAD, b'{"lora_name": "x", "lora_path": ""}'),
        (LOAD, b'{"lora_name": "base", "lora_path": "/tmp"}'),
        (LOAD, b'{"lora_name": "there", "lora_path": "STEP"}'),
        (UNLOAD, b"{}"),
        (UNLOAD, b'{"lora_name": ""}'),
        (UNLOAD, b'{"lora_name": "nobody"}'),
        (UNLOAD, b'{"lora_name": "there", "lora_int_id": 7}'),
    ],
)
async def test_an_error_is_the_servers_own(server: VllmServer, tmp_path: Path, path: str, body: bytes) -> None:
    """The same call, sent to the server itself and to the sidecar, on both of which a name is loaded."""
    step = write_version(tmp_path / "step", 1)
    content = body.replace(b"STEP", str(step).encode())
    async with in_front(server, None, tmp_path, openai={"load_calls": True}) as front:
        async with http_client(server.http_address) as straight:
            said = []
            for client in (straight, front.client):
                assert (await load(client, step, "there")).status_code == 200
                reply = await client.post(path, content=content, headers=JSON)
                said.append((reply.status_code, reply.text if reply.status_code == 200 else json.loads(reply.content)))
            await straight.post(UNLOAD, json={"lora_name": "there"})
        assert said[1] == said[0]


@pytest.mark.parametrize(
    "change",
    [
        {"r": 64},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 64}},
    ],
    ids=str,
)
async def test_what_the_server_says_of_a_bad_adapter_is_said_first(
    server: VllmServer, tmp_path: Path, change: dict[str, Any]
) -> None:
    """The sidecar refuses it before it is sent, in the server's words; its own, with a way out, come after them."""
    step = write_version(tmp_path / "step", 1)
    config = step / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    async with (
        in_front(server, None, tmp_path, openai={"load_calls": True}) as front,
        http_client(server.http_address) as straight,
    ):
        theirs, ours = await load(straight, step, "bad"), await load(front.client, step, "bad")
    assert (theirs.status_code, ours.status_code) == (500, 500)
    end = "', please check the stack trace above for the root cause"
    cause = theirs.json()["error"]["message"].removesuffix(end)
    assert ours.json()["error"]["message"].startswith(cause)
    assert ours.json()["error"]["type"] == theirs.json()["error"]["type"] == "InternalServerError"
