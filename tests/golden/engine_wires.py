"""What engines of the OpenAI family receive from a sidecar, byte for byte, as a proxy in between writes it down.

Looks at a server are repeated as long as it is up, so each is kept once. Calls and requests are kept in order.
`python -m tests.golden.engine_wires` writes down anew what is wanted.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import httpx
from aiohttp import web

from sidecar.proto import admin_pb2
from tests.kit import trtllm_served
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.sglang_emulated import running_sglang, sglang_entry
from tests.kit.trtllm_emulated import running_trtllm
from tests.kit.vllm_emulated import running_vllm

WIRES = Path(__file__).parent / "wires"
OF_ITS_OWN = ("host", "content-length")
"""Headers that differ from run to run, or follow from the body."""
RANDOM = re.compile(r'lora-sidecar-check-\w+|(?<="rid\\":\\")[0-9a-f]{32}|(?<="rid\\": \\")[0-9a-f]{32}')
"""The names of trials, and requests' ids."""
WEIGHTS = re.compile(r"[\w+/=]{1000,}")
"""Weights in base64, of which the digest is kept."""
HELD = b"x" * 9
"""The prompt of the request that is cancelled: its engine never answers."""
CHAT = [{"role": "user", "content": "hello"}]


@dataclass
class Wire:
    """What one engine has received."""

    looks: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)

    def lines(self, hides: Callable[[str], str]) -> list[str]:
        return [hides(line) for line in (*sorted(self.looks), *self.calls)]

    def heard(self, request: web.Request, body: bytes) -> None:
        headers = [f"{name.lower()}: {value}" for name, value in request.headers.items()]
        kept = [each for each in headers if not each.startswith(OF_ITS_OWN)]
        line = json.dumps([request.method, request.path_qs, kept, body.decode()])
        if request.method == "GET":
            self.looks.add(line)
        else:
            self.calls.append(line)


@dataclass
class Proxied:
    """An engine behind a proxy."""

    http_address: str


@asynccontextmanager
async def proxied(engine: str, wire: Wire, paths: Mapping[str, str] = {}) -> AsyncIterator[Proxied]:
    """Run a proxy in front of an engine that writes down what it passes on; `paths` are the engine's by ours."""

    async def passed_on(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        wire.heard(request, body)
        if HELD in body:
            await asyncio.Event().wait()
        headers = {name: value for name, value in request.headers.items() if name.lower() != "host"}
        url = f"http://{engine}{paths.get(request.path, request.path_qs)}"
        async with session.request(request.method, url, headers=headers, data=body) as answer:
            kept = {"content-type": answer.headers.get("content-type", "text/plain")}
            told = web.StreamResponse(status=answer.status, headers=kept)
            await told.prepare(request)
            async for piece in answer.content.iter_any():
                await told.write(piece)
            await told.write_eof()
            return told

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", passed_on)
    runner = web.AppRunner(app, handler_cancellation=True)
    async with aiohttp.ClientSession() as session:
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0][:2]
            yield Proxied(f"{host}:{port}")
        finally:
            await runner.cleanup()


async def asked_all(served: Serving, wire: Wire) -> None:
    """Ask in turn for what makes a sidecar call: hits and misses of each API, a cancel, a refusal, an eviction."""
    for name in ("a00", "a00", "", "a01", "a02", "a00"):
        await served.ask(name)
    url = f"http://{served.sidecar.http_address}"
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for body in (
            {"model": "a01", "prompt": "one two", "max_tokens": 3},
            {"model": "a01", "prompt": [1, 2, 3], "max_tokens": 3, "stream": True},
            {"stream": False, "max_tokens": 2, "model": "base", "prompt": "é"},
            {"model": "a02", "prompt": "refused", "max_tokens": -1},
        ):
            await client.post("/v1/completions", json=body)
        for more in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
            await client.post("/v1/chat/completions", json={"messages": CHAT, "model": "a02", "max_tokens": 3} | more)
        sent = len(wire.calls)
        asking = asyncio.create_task(client.post("/v1/completions", json={"model": "a02", "prompt": HELD.decode()}))
        await until(lambda: len(wire.calls) > sent)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: not served.state.requests)
    await served.adapters.Evict(admin_pb2.AdapterRequest(name="a02"))
    await served.ask("a01")


@asynccontextmanager
async def vllm(folder: Path, **options: Any) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    async with running_vllm(compute="none", max_loras=2, max_cpu_loras=2, **options) as (engine, _):
        limits = {"device_pages": 2, "host_pages": 2, "seats": 32}
        yield engine.http_address, {"adapters_dir": str(folder / "shared"), "engine": limits}


@asynccontextmanager
async def trtllm(folder: Path) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    async with running_trtllm() as (engine, _):
        yield engine.http_address, trtllm_served.entry_of(folder)


@asynccontextmanager
async def sglang(folder: Path, **more: Any) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    async with running_sglang(compute="none", max_loras=2, max_cpu_loras=2, seats=32) as engine:
        yield engine.http_address, sglang_entry(folder) | more


def weights_by_digest(line: str) -> str:
    return WEIGHTS.sub(lambda found: sha256(found[0].encode()).hexdigest(), line)


KINDS: dict[str, Callable[[Path], AbstractAsyncContextManager[tuple[str, dict[str, Any]]]]] = {
    "vllm": vllm,
    "vllm-rust": lambda folder: vllm(folder, rust_frontend=True, allowed_prefix=(str(folder),)),
    "trtllm": trtllm,
    "sglang": sglang,
    "sglang-files": lambda folder: sglang(folder, adapters_dir=str(folder / "shared")),
}


async def recorded(kind: str, folder: Path) -> list[str]:
    """Return what an engine of a kind receives, each a line of JSON: method, path, headers, body."""
    wire = Wire()
    write_adapters(folder / "adapters", 3)
    async with KINDS[kind](folder) as (address, entry), proxied(address, wire) as engine:
        scheme = kind.partition("-")[0]
        record = entry | {"url": f"{scheme}://{engine.http_address}", "id": f"{scheme}-0"}
        async with serving([], folder / "adapters", [folder], backends=[record]) as served:
            await asked_all(served, wire)
    return wire.lines(lambda line: weights_by_digest(RANDOM.sub("*", line.replace(str(folder), "FOLDER"))))


if __name__ == "__main__":
    for each in KINDS:
        with TemporaryDirectory() as of_its_own:
            found = asyncio.run(recorded(each, Path(of_its_own)))
        (WIRES / f"{each}.jsonl").write_text("".join(f"{line}\n" for line in found))
