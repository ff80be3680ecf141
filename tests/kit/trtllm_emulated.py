"""Emulated trtllm-serves for tests: in this process, or in a process that can be killed and restarted.

`start_trtllm(**options)` takes the fields of `sidecar.lab.engine.trtllm.TrtllmOptions`; by default, time is not
simulated (every step takes as long as it computes). `TrtllmProcess` takes the options of `sidecar emulate --protocol
trtllm`.

With `compute="none"`, an answer depends on the adapter: `expected(folder, count)` returns its tokens, where `folder` is
any copy of the files that were first read under the number. `expected(None, n)` returns the base model's tokens.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from sidecar.lab.engine.kserve.compute import dummy_token
from sidecar.lab.engine.trtllm import TrtllmOptions, TrtllmServer, serve_trtllm
from sidecar.lab.engine.trtllm.checkpoint import content_id
from tests.kit.engine_process import EmulatorProcess

BASE = "base"
BASE_CONFIG = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 160, "vocab_size": 259,
}  # fmt: skip
"""The config.json of the small Llama, as its base model's files have it."""
DONE = "[DONE]"


async def start_trtllm(**options: Any) -> TrtllmServer:
    """Start an emulated trtllm-serve in this event loop; the caller stops it."""
    return await serve_trtllm(TrtllmOptions(**({"time_scale": 0.0, "served_model_name": (BASE,)} | options)))


@asynccontextmanager
async def running_trtllm(**options: Any) -> AsyncIterator[tuple[TrtllmServer, Client]]:
    """Run an emulated trtllm-serve for the length of a block, with a client of it."""
    server = await start_trtllm(**options)
    try:
        async with Client(server.http_address) as client:
            yield server, client
    finally:
        await server.stop()


def expected(folder: Path | None, count: int, start: int = 0) -> list[int]:
    """Return the tokens of an engine with dummy compute; without a folder, the base model's."""
    number = 0 if folder is None else content_id(folder)
    return [dummy_token(number, position) for position in range(start, start + count)]


def lora(number: int, folder: Path | str, name: str = "adapter") -> dict[str, Any]:
    """Return the field by which a request names an adapter."""
    return {"lora_name": name, "lora_int_id": number, "lora_path": str(folder)}


class Client:
    """A client of trtllm-serve's API. `number` and `folder` name an adapter; without them it is the base model."""

    def __init__(self, address: str, patience_s: float = 60.0) -> None:
        self.http = httpx.AsyncClient(base_url=f"http://{address}", timeout=patience_s)

    async def complete(
        self,
        number: int | None = None,
        folder: Path | str = "",
        prompt: Any = "hello",
        tokens: int | None = 4,
        **fields: Any,
    ) -> httpx.Response:
        """Request a completion without streaming."""
        return await self.http.post("/v1/completions", json=body_of(number, folder, prompt, tokens) | fields)

    async def tokens(
        self,
        number: int | None = None,
        folder: Path | str = "",
        prompt: Any = "hello",
        tokens: int | None = 4,
        **fields: Any,
    ) -> list[int]:
        """Return the tokens of a completion; fails on an error."""
        answer = await self.complete(number, folder, prompt, tokens, detokenize=False, **fields)
        assert answer.status_code == 200, answer.text
        made: list[int] = answer.json()["choices"][0]["token_ids"]
        return made

    async def chat(self, number: int | None = None, folder: Path | str = "", **fields: Any) -> httpx.Response:
        """Request a chat's answer without streaming."""
        return await self.http.post("/v1/chat/completions", json=chat_body_of(number, folder) | fields)

    async def stream(self, path: str, **body: Any) -> AsyncIterator[Any]:
        """Yield the parsed events of a stream, and `DONE` unparsed; fail on an error status."""
        async with self.http.stream("POST", path, json={"stream": True} | body) as answer:
            if answer.status_code != 200:
                raise AssertionError((await answer.aread()).decode())
            async for line in answer.aiter_lines():
                if line:
                    data = line.removeprefix("data: ").strip()
                    yield data if data == DONE else json.loads(data)

    async def events(
        self, number: int | None = None, folder: Path | str = "", tokens: int | None = 4, **fields: Any
    ) -> list[Any]:
        """Return all events of a streamed completion."""
        body = body_of(number, folder, "hello", tokens) | fields
        return [event async for event in self.stream("/v1/completions", **body)]

    async def state(self) -> dict[str, Any]:
        """Return what the emulator tells of itself: ids, bytes on the host, why it died."""
        told: dict[str, Any] = (await self.http.get("/emulator")).json()
        return told

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()


class TrtllmProcess(EmulatorProcess):
    """An emulated trtllm-serve in a process of its own."""

    def __init__(self, *arguments: str, time_scale: float = 0.0, http_port: int = 0) -> None:
        scale = ("--time-scale", str(time_scale))
        super().__init__("--protocol", "trtllm", "--served-model-name", BASE, *arguments, *scale, http=http_port)

    @property
    def http_address(self) -> str:
        """Host and port of the API and of the metrics."""
        return self.address("http")

    metrics_address = http_address


def body_of(number: int | None, folder: Path | str, prompt: Any = "hello", tokens: int | None = 4) -> dict[str, Any]:
    """Return the body of a completion."""
    body: dict[str, Any] = {"model": BASE, "prompt": prompt, "temperature": 0}
    if tokens is not None:
        body["max_tokens"] = tokens
    return body if number is None else body | {"lora_request": lora(number, folder)}


def chat_body_of(number: int | None, folder: Path | str, tokens: int = 4) -> dict[str, Any]:
    """Return the body of a chat."""
    messages = [{"role": "user", "content": "hi"}]
    body: dict[str, Any] = {"model": BASE, "messages": messages, "max_tokens": tokens, "temperature": 0}
    return body if number is None else body | {"lora_request": lora(number, folder)}
