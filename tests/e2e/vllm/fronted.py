"""A sidecar in front of a real vLLM, and clients of its OpenAI API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.vllm.direct import completion, http_client
from tests.e2e.vllm.faces import events_of
from tests.e2e.vllm.server import VllmServer
from tests.kit.serving import Serving, serving

SEATS = 32
"""What the sidecar keeps in flight at the engine."""


def backend_of(server: Any, shared: Path, seats: int = SEATS, **fields: Any) -> dict[str, Any]:
    """Return a server's entry in the configuration. On the CPU it answers wrongly with the base model in a batch."""
    engine = {
        "device_pages": server.max_loras,
        "host_pages": server.max_cpu_loras,
        "rank_max": server.max_lora_rank,
        "seats": seats,
        "base_apart": True,
    } | fields.pop("engine", {})
    return {
        "url": f"vllm://{server.http_address}",
        "id": "vllm-0",
        "adapters_dir": str(shared),
        "engine": engine,
    } | fields


@dataclass
class Front:
    """A running sidecar, a client of its HTTP listener, and the folder that it shares with the engine."""

    served: Serving
    client: httpx.AsyncClient
    shared: Path

    def staged(self, name: str) -> Path:
        """Return the folder of a name's current version."""
        (found,) = self.shared.glob(f"{self.served.state.names[name].digest}.*")
        return found


@asynccontextmanager
async def in_front(
    server: VllmServer, adapters: Path | None, scratch: Path, backend: dict[str, Any] | None = None, **config: Any
) -> AsyncIterator[Front]:
    """Run a sidecar in front of a vLLM. `adapters` is the folder that is served; `backend` are fields of its entry."""
    shared = scratch / "shared"
    entry = backend_of(server, shared, **(backend or {}))
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(serving([], adapters, [scratch], **{"backends": [entry]} | config))
        client = await stack.enter_async_context(http_client(served.sidecar.http_address))
        yield Front(served, client, shared)


@dataclass
class Told:
    """What a client was told: status, token ids, who answered; `error`: an error's message, before or in the answer."""

    model: str
    status: int
    tokens: list[int] = field(default_factory=list)
    error: str = ""
    whole: bool = False
    headers: httpx.Headers = field(default_factory=httpx.Headers)

    @property
    def version(self) -> str:
        return str(self.headers.get("x-lora-version", ""))


async def ask(
    client: httpx.AsyncClient, model: str, prompt: Sequence[int], tokens: int, stream: bool = False, **fields: Any
) -> Told:
    """Ask for a completion, and keep what came even if the answer breaks off."""
    told = Told(model, 0)
    await ask_into(told, client, prompt, tokens, stream, **fields)
    return told


async def ask_into(
    told: Told, client: httpx.AsyncClient, prompt: Sequence[int], tokens: int, stream: bool, **fields: Any
) -> None:
    """Ask, and write down what comes as it comes."""
    body = completion(told.model, prompt, tokens, stream=stream, **fields)
    try:
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            told.status, told.headers = reply.status_code, reply.headers
            if stream and reply.status_code == httpx.codes.OK:
                await _follow(told, reply)
            else:
                _read(told, await reply.aread())
    except httpx.HTTPError as error:
        told.error = told.error or f"the connection broke: {error}"


async def _follow(told: Told, reply: httpx.Response) -> None:
    rest = ""
    async for piece in reply.aiter_text():
        *complete, rest = (rest + piece).split("\n\n")
        for event in events_of("".join(f"{one}\n\n" for one in complete)):
            if event == "[DONE]":
                told.whole = not told.error
            else:
                _take(told, json.loads(event))
    assert not rest, f"half an event: {rest}"


def _read(told: Told, body: bytes) -> None:
    record = json.loads(body)
    _take(told, record)
    told.whole = told.status == httpx.codes.OK


def _take(told: Told, record: dict[str, Any]) -> None:
    if "error" in record:
        told.error = record["error"]["message"]
        return
    assert record["model"] == told.model
    for choice in record["choices"]:
        told.tokens += choice["token_ids"] or ()
