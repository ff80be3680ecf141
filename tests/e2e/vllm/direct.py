"""A vLLM server asked without the sidecar: its own API, its metrics, and loads of many requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

CONNECTIONS = 1000
PATIENCE_S = 180.0
KEPT_S = 1.0
"""vLLM closes a connection that was idle for five seconds, also under a request that is just being sent."""


@asynccontextmanager
async def http_client(address: str) -> AsyncIterator[httpx.AsyncClient]:
    """Give a client that waits far longer than anything takes."""
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS, keepalive_expiry=KEPT_S)
    async with httpx.AsyncClient(
        base_url=f"http://{address}", trust_env=False, timeout=PATIENCE_S, limits=limits
    ) as client:
        yield client


def completion(model: str, prompt: str | Sequence[int], tokens: int, **fields: Any) -> dict[str, Any]:
    """Return the body of a greedy request for exactly so many tokens, whose ids are told."""
    asked = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return asked | {"ignore_eos": True, "return_token_ids": True} | fields


async def complete(
    client: httpx.AsyncClient, model: str, prompt: Sequence[int], tokens: int, **fields: Any
) -> list[int]:
    """Return the token ids of an answer. Fails with what the server says instead."""
    reply = await client.post("/v1/completions", json=completion(model, prompt, tokens, **fields))
    assert reply.status_code == httpx.codes.OK, f"{reply.status_code}: {reply.text}"
    answer = reply.json()
    assert answer["model"] == model
    (choice,) = answer["choices"]
    return list(choice["token_ids"])


async def load(client: httpx.AsyncClient, name: str, path: Path | str, **fields: Any) -> httpx.Response:
    return await client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)} | fields)


async def unload(client: httpx.AsyncClient, name: str) -> httpx.Response:
    return await client.post("/v1/unload_lora_adapter", json={"lora_name": name})


async def registered(client: httpx.AsyncClient) -> dict[str, str]:
    """Return the adapters that a server knows, by name with their paths."""
    entries = (await client.get("/v1/models")).raise_for_status().json()["data"]
    return {entry["id"]: entry["root"] for entry in entries if entry["parent"] is not None}


async def forget_all(address: str) -> None:
    """Have a server know no adapter. The Rust front end forgets one that its engine has in memory."""
    async with http_client(address) as client:
        for name, path in (await registered(client)).items():
            if (await unload(client, name)).status_code == httpx.codes.INTERNAL_SERVER_ERROR:
                (await load(client, name, path, load_inplace=True)).raise_for_status()
                (await unload(client, name)).raise_for_status()


@dataclass(frozen=True)
class Metrics:
    """A scrape: the sum of each sample's series by its name."""

    values: dict[str, float]

    @property
    def steps(self) -> int:
        """Engine steps so far."""
        return int(self.values["vllm:iteration_tokens_total_count"])

    @property
    def tokens(self) -> int:
        """Tokens that went through those steps, of prompts and of answers."""
        return int(self.values["vllm:iteration_tokens_total_sum"])

    @property
    def running(self) -> int:
        return int(self.values["vllm:num_requests_running"])

    @property
    def waiting(self) -> int:
        return int(self.values["vllm:num_requests_waiting"])


async def inside(client: httpx.AsyncClient) -> int:
    """Return how many requests a server has taken and not answered yet."""
    return int((await client.get("/load")).raise_for_status().json()["server_load"])


async def metrics(client: httpx.AsyncClient) -> Metrics:
    text = (await client.get("/metrics")).raise_for_status().text
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return Metrics(values)


@dataclass
class Work:
    """What a load made the engine do: steps, tokens, and how long that took."""

    steps: int
    tokens: int
    seconds: float

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps

    def __str__(self) -> str:
        return f"{self.tokens_per_step:.2f} tokens a step ({self.tokens} in {self.steps} steps, {self.seconds:.1f} s)"


@asynccontextmanager
async def measured(client: httpx.AsyncClient) -> AsyncIterator[Work]:
    """Measure the engine's work over a block; known after it."""
    before, began = await metrics(client), monotonic()
    work = Work(0, 0, 0.0)
    yield work
    work.seconds = monotonic() - began
    after = await metrics(client)
    work.steps, work.tokens = after.steps - before.steps, after.tokens - before.tokens


async def at_once(limit: int, asks: Sequence[Any]) -> list[Any]:
    """Run what each call of `asks` returns, begun in their order, no more than so many at a time."""
    free = asyncio.Semaphore(limit)

    async def one(ask: Any) -> Any:
        async with free:
            return await ask()

    return await asyncio.gather(*(one(ask) for ask in asks))
