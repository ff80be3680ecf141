"""The emulated SGLang answers as the real one does: one dialogue with both, status, members and texts compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.sglang.fronted import SIZES
from tests.e2e.sglang.server import SglangServer
from tests.e2e.vllm.direct import http_client
from tests.e2e.vllm.toy import prompt
from tests.kit.peft_files import TINY, Dims, write_adapter
from tests.kit.sglang_emulated import running_sglang

CONTEXT = 2048
VARYING = {"id", "created", "timestamp", "text", "content", "token_ids", "prompt_tokens", "total_tokens"}
"""Members whose values are others each time, or another model's."""
ASKED = {"prompt": prompt(1, 5), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "def f"}], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
STREAM = {"stream": True}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass
class Dialogue:
    """What one server was asked and answered."""

    client: httpx.AsyncClient
    folder: Path
    dims: Dims
    told: list[Any] = field(default_factory=list)

    async def ask(self, path: str, body: Any = None) -> None:
        method = "GET" if body is None else "POST"
        reply = await self.client.request(method, path, json=body)
        self.told.append((path, body and _same(body), reply.status_code, _content(reply)))

    def adapter(self, name: str, **options: Any) -> str:
        """Write an adapter for the server's model and return its folder."""
        fields = {"modules": ("q_proj", "v_proj"), "dtype": "float16", "rank": 8}
        return str(write_adapter(self.folder / name, shape=self.dims, **fields | options))

    async def load(self, name: str, path: str) -> None:
        await self.ask("/load_lora_adapter", {"lora_name": name, "lora_path": path})


def _content(reply: httpx.Response) -> Any:
    if reply.headers.get("content-type", "").startswith("text/event-stream"):
        events = [_fixed(json.loads(event)) if event != "[DONE]" else event for event in _events(reply.text)]
        return [event for event, _ in groupby(events)]  # a server that lags puts several tokens into one
    return _fixed(reply.json()) if reply.text else ""


def _events(stream: str) -> Iterator[str]:
    for part in stream.split("\n\n"):
        if part:
            assert part.startswith("data: "), part
            yield part.removeprefix("data: ")


def _fixed(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return [(key, _fixed(inner, key)) for key, inner in value.items()]  # the order counts
    if name in VARYING and value not in ("", None):
        return "…"
    if isinstance(value, list):
        return [_fixed(each) for each in value]
    return _same(value) if isinstance(value, str) else value


def _same(value: Any) -> str:
    return re.sub(r"/\S*/(real|emulated)/", "/", str(value))


async def talk(with_it: Dialogue) -> None:
    """Ask for everything that a sidecar relies on, and for what it must never send."""
    ask, load = with_it.ask, with_it.load
    good = with_it.adapter("good")
    await ask("/v1/models")
    await load("a", good)
    await load("a", good)
    await load("twin", good)
    await ask("/v1/models")
    await load("big", with_it.adapter("big", rank=64))
    await load("dora", with_it.adapter("dora", use_dora=True))
    await load("gone", str(with_it.folder / "none"))
    for path, model in (("/v1/completions", "base"), ("/v1/completions", "base:a"), ("/v1/completions", "a")):
        await ask(path, ASKED | {"model": model})
    for more in ({}, STREAM, USAGE, {"return_token_ids": True}, STREAM | {"return_token_ids": True}, {"n": 2}):
        await ask("/v1/completions", ASKED | {"model": "base:a"} | more)
    for more in ({}, STREAM, USAGE, {"n": 2}):
        await ask("/v1/chat/completions", CHAT | {"model": "base:a"} | more)
    for model in ("base:never", "never"):
        await ask("/v1/completions", ASKED | {"model": model})
        await ask("/v1/completions", ASKED | STREAM | {"model": model})
    await ask("/v1/completions", ASKED | {"model": "base:a", "prompt": prompt(1, CONTEXT + 1)})
    await ask("/v1/completions", ASKED | {"model": "base:a", "max_tokens": CONTEXT})
    await ask("/abort_request", {"rid": "never"})
    await ask("/unload_lora_adapter", {"lora_name": "a"})
    await ask("/unload_lora_adapter", {"lora_name": "a"})
    await ask("/v1/models")
    await ask("/v1/completions", ASKED | {"model": "base:a"})  # it comes back by its path
    await ask("/v1/models")
    await ask("/v1/load_lora_adapter", {"lora_name": "b", "lora_path": good})


async def test_the_emulated_server_answers_as_the_real_one(server: SglangServer, tmp_path: Path) -> None:
    async with http_client(server.http_address) as client:
        real = Dialogue(client, tmp_path / "real", SIZES)
        await talk(real)
    limits = {"max_loras": 4, "max_cpu_loras": 8, "max_lora_rank": 16, "seats": 32, "max_seq_tokens": CONTEXT}
    async with running_sglang(compute="none", **limits) as engine, http_client(engine.http_address) as client:
        ours = Dialogue(client, tmp_path / "emulated", TINY)
        await talk(ours)
    for mine, wanted in zip(ours.told, real.told, strict=True):
        assert mine == wanted
