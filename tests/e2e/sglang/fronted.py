"""A sidecar in front of a real SGLang, and SGLang asked without it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.sglang.server import SglangServer
from tests.e2e.vllm.direct import http_client, registered
from tests.e2e.vllm.fronted import Front
from tests.e2e.vllm.toy import BASE_MODEL, Toy
from tests.kit.peft_files import Dims
from tests.kit.serving import serving

SIZES = Dims(hidden=256, layers=4, heads=8, kv_heads=4, head_size=32, ffn=704)
"""The toy's. SGLang pads an ffn that is no multiple of 64, and adapters of the model's own sizes end it then."""


def entry_of(server: SglangServer, toy: Toy) -> dict[str, Any]:
    """Return a server's entry in the configuration; its sizes are asked."""
    base = {"name": BASE_MODEL, "config": str(toy.model)}
    return {"url": f"sglang://{server.http_address}", "id": "sglang-0", "base_model": base}


@asynccontextmanager
async def in_front(
    server: SglangServer, toy: Toy, scratch: Path, adapters: Path | None = None, **fields: Any
) -> AsyncIterator[Front]:
    """Run a sidecar in front of an SGLang, which is sent weights, or reads them if `adapters_dir` is given."""
    shared = scratch / "shared"
    backends = [entry_of(server, toy) | fields]
    async with (
        serving([], adapters or toy.adapters, [scratch, toy.folder], backends=backends) as served,
        http_client(served.sidecar.http_address) as client,
    ):
        yield Front(served, client, shared)


async def load(client: httpx.AsyncClient, name: str, path: Path) -> None:
    reply = await client.post("/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})
    assert reply.status_code == httpx.codes.OK, reply.text


async def forget_all(address: str) -> None:
    async with http_client(address) as client:
        for name in await registered(client):
            (await client.post("/unload_lora_adapter", json={"lora_name": name})).raise_for_status()
