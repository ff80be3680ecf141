"""Emulated vLLMs for tests: in this process, or in a process that can be killed and restarted.

`start_vllm(**options)` takes the fields of `sidecar.lab.engine.openai.VllmOptions`; by default, time is not simulated
(every step takes as long as it computes). `VllmProcess` takes the options of `sidecar emulate --protocol vllm`.

With `compute="none"`, an answer depends on the adapter: `expected(engine_name, folder, count)` returns its tokens.
`engine_name` is the adapter's name at the engine, and `folder` any copy of the loaded files. `expected("", None, n)`
returns the base model's tokens. An answer that used another adapter's prefix blocks equals neither.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from sidecar.lab.engine.kserve.compute import dummy_token
from sidecar.lab.engine.openai import VllmOptions, VllmServer, serve_vllm
from sidecar.lab.engine.openai.folder import content_id
from tests.kit.engine_process import EmulatorProcess

BASE = "base"
DONE = "[DONE]"


async def start_vllm(**options: Any) -> VllmServer:
    """Start an emulated vLLM in this event loop; the caller stops it."""
    return await serve_vllm(VllmOptions(**({"time_scale": 0.0, "served_model_name": (BASE,)} | options)))


@asynccontextmanager
async def running_vllm(**options: Any) -> AsyncIterator[tuple[VllmServer, Client]]:
    """Run an emulated vLLM for the length of a block, with a client of it."""
    server = await start_vllm(**options)
    try:
        async with Client(server.http_address) as client:
            yield server, client
    finally:
        await server.stop()


def expected(engine_name: str, folder: Path | None, count: int, start: int = 0) -> list[int]:
    """Return the tokens of an engine with dummy compute; without a folder, the base model's."""
    number = 0 if folder is None else content_id(engine_name, folder)
    return [dummy_token(number, position) for position in range(start, start + count)]


class Client:
    """A client of any OpenAI API."""

    def __init__(self, address: str, patience_s: float = 60.0) -> None:
        self.http = httpx.AsyncClient(base_url=f"http://{address}", timeout=httpx.Timeout(60.0, read=patience_s))

    async def load(self, name: str, path: Path | str, **fields: Any) -> httpx.Response:
        """Request the load of an adapter."""
        return await self.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)} | fields)

    async def unload(self, name: str) -> httpx.Response:
        """Request the unload of an adapter."""
        return await self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    async def models(self) -> dict[str, dict[str, Any]]:
        """Return the listed models, by id."""
        listed = (await self.http.get("/v1/models")).json()["data"]
        return {card["id"]: card for card in listed}

    async def complete(self, model: str, prompt: Any = "hello", tokens: int = 4, **fields: Any) -> httpx.Response:
        """Request a completion without streaming."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return await self.http.post("/v1/completions", json=body | fields)

    async def tokens(self, model: str, prompt: Any = "hello", tokens: int = 4, **fields: Any) -> list[int]:
        """Return the tokens of a completion; fails on an error."""
        answer = await self.complete(model, prompt, tokens, return_token_ids=True, **fields)
        assert answer.status_code == 200, answer.text
        made: list[int] = answer.json()["choices"][0]["token_ids"]
        return made

    async def stream(self, path: str, **body: Any) -> AsyncIterator[Any]:
        """Yield the parsed events of a stream, and `DONE` unparsed; fail on an error status."""
        async with self.http.stream("POST", path, json={"temperature": 0, "stream": True} | body) as answer:
            if answer.status_code != 200:
                raise AssertionError((await answer.aread()).decode())
            async for line in answer.aiter_lines():
                if line:
                    data = line.removeprefix("data: ")
                    yield data if data == DONE else json.loads(data)

    async def completion_events(self, model: str, prompt: Any = "hello", tokens: int = 4, **fields: Any) -> list[Any]:
        """Return all events of a streamed completion."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens} | fields
        return [event async for event in self.stream("/v1/completions", **body)]

    async def samples(self, family: str) -> dict[tuple[str, ...], float]:
        """Return a family's samples, keyed by the values of all labels but the engine's, in the labels' order."""
        text = (await self.http.get("/metrics")).text
        found = {}
        for metric in text_string_to_metric_families(text):
            for sample in metric.samples:
                if sample.name == family:
                    labels = {k: v for k, v in sample.labels.items() if k not in ("engine", "model_name")}
                    found[tuple(labels[key] for key in sorted(labels))] = sample.value
        return found

    async def sample(self, family: str) -> float:
        """Return the only sample of a family."""
        (value,) = (await self.samples(family)).values()
        return value

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()


class VllmProcess(EmulatorProcess):
    """An emulated vLLM in a process of its own."""

    def __init__(self, *arguments: str, time_scale: float = 0.0, http_port: int = 0) -> None:
        scale = ("--time-scale", str(time_scale))
        super().__init__("--protocol", "vllm", "--served-model-name", BASE, *arguments, *scale, http=http_port)

    @property
    def http_address(self) -> str:
        """Host and port of the API and of the metrics."""
        return self.address("http")

    metrics_address = http_address


async def unload_all(vllm: Client) -> None:
    """Unload all adapters, as somebody does who does not know the sidecar."""
    for name, card in (await vllm.models()).items():
        if card["parent"]:
            await vllm.unload(name)


def texts_of(events: Sequence[Any], index: int = 0) -> str:
    """Return the text of one choice of a streamed completion."""
    choices = [choice for event in events if event != DONE for choice in event["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)
