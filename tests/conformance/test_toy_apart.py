"""The toy kind where a request leaves the process that took it, and where engines are found: no other file knows it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.backends import registry
from sidecar.core.effects import Dispatch
from sidecar.fronts.openai.large import LARGE_BYTES
from sidecar.proto import admin_pb2, gateway_pb2
from tests.conformance.toy.engine import ToyEngine, answer, content_of, text_of
from tests.kit.found_engines import HOST, Names
from tests.kit.found_engines import in_front as found_in_front
from tests.kit.peft_files import BASE_MODEL
from tests.kit.redis_servers import running
from tests.kit.replica_pool import owned, replicas
from tests.kit.serving import Serving, serving, until, write_adapters

TOY = "tests.conformance.toy.kind:TOY"
PROMPT, COUNT = "two plus two", 4


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test names is not known to the next."""
    monkeypatch.setattr(registry, "_from_elsewhere", {})


@asynccontextmanager
async def engines(count: int) -> AsyncIterator[list[ToyEngine]]:
    """Run toy engines for the length of a block."""
    async with AsyncExitStack() as stack:
        made = [ToyEngine() for _ in range(count)]
        for engine in made:
            await engine.start()
            stack.push_async_callback(engine.kill)
        yield made


def entry(tmp_path: Path, engine: ToyEngine, number: int) -> dict[str, Any]:
    return {"url": f"toy://{engine.address}", "id": f"b{number}", **common(tmp_path)}


def common(tmp_path: Path) -> dict[str, Any]:
    return {"kind": TOY, "base_model": BASE_MODEL, "adapters_dir": str(tmp_path / "shared")}


def said(tmp_path: Path, name: str, prompt: str = PROMPT, count: int = COUNT) -> str:
    """Return the toy engine's answer."""
    return text_of(answer(content_of(tmp_path / "adapters" / name), prompt.encode(), count))


async def generate(served: Serving, name: str) -> str:
    request = gateway_pb2.GenerateRequest(adapter=name, text=PROMPT, max_tokens=COUNT)
    return "".join([reply.text async for reply in served.gateway.Generate(request)])


async def pieces(served: Serving, name: str) -> list[str]:
    """Return the texts of a streamed completion, as they came."""
    body = {"model": name, "prompt": PROMPT, "stream": True, "max_tokens": COUNT}
    async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", timeout=60) as client:
        lines = (await client.post("/v1/completions", json=body)).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return [text for event in events for choice in event["choices"] if (text := choice["text"])]


async def test_a_large_body_is_written_in_another_process(tmp_path: Path) -> None:
    """That process knows the kinds that the configuration names, too."""
    write_adapters(tmp_path / "adapters", 1)
    prompt = "a" * (LARGE_BYTES + 1)
    async with (
        engines(1) as (engine,),
        serving([], tmp_path / "adapters", backends=[entry(tmp_path, engine, 0)]) as served,
        httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", timeout=60) as client,
    ):
        body = {"model": "a00", "prompt": prompt, "max_tokens": 2}
        reply = await client.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["text"] == said(tmp_path, "a00", prompt, 2)


async def test_replicas_pass_requests_on(tmp_path: Path) -> None:
    """A request goes to the owner of its backend in the kind's own words, and its answer comes back so."""
    names = write_adapters(tmp_path / "adapters", 4)
    async with (
        running(tmp_path / "redis") as redis,
        engines(2) as made,
        replicas(
            2,
            redis.url,
            [],
            tmp_path / "adapters",
            backends=[entry(tmp_path, engine, number) for number, engine in enumerate(made)],
        ) as pool,
    ):
        assert set().union(*map(owned, pool)) == {"b0", "b1"}
        for name in names:
            answers = await asyncio.gather(*(generate(served, name) for served in pool))
            assert answers == [said(tmp_path, name)] * 2
        assert sum(served.sidecar.replica.router.forwards for served in pool) > 0
        assert sum(served.recorder.count(Dispatch) for served in pool) == 2 * len(names)


async def test_engines_are_found(tmp_path: Path) -> None:
    """A pool of the kind begins empty, serves when an engine is found, and says by whom."""
    write_adapters(tmp_path / "adapters", 1)
    names = Names()
    async with engines(1) as (engine,):
        host, _, port = engine.address.rpartition(":")
        config = {
            "backends": [{"id": "toys", "discover": {"dns": f"{HOST}:{port}"}, **common(tmp_path)}],
            "listeners": {name: {"address": "127.0.0.1:0"} for name in ("data", "admin", "http")},
            "adapters": {"serve": str(tmp_path / "adapters")},
        }
        async with found_in_front(config, names.finder) as served:
            await until(lambda: "a00" in served.state.names)
            waiting = asyncio.gather(generate(served, "a00"), pieces(served, "a00"))
            await asyncio.sleep(0.1)  # both are queued by then
            names.addresses.append(host)
            whole, parts = await waiting
            assert (whole, "".join(parts), len(parts)) == (said(tmp_path, "a00"), whole, COUNT)
            listed = await served.backends.List(admin_pb2.ListBackendsRequest())
            assert [(backend.id, backend.state) for backend in listed.backends] == [(f"toys-{host}", "up")]


async def test_adapters_are_verified(tmp_path: Path) -> None:
    """`adapters verify` asks engines of the kind, and finds that the adapter changes their answers."""
    write_adapters(tmp_path / "adapters", 1)
    async with (
        engines(1) as (engine,),
        serving([], tmp_path / "adapters", backends=[entry(tmp_path, engine, 0)]) as served,
    ):
        call = served.adapters.Verify(admin_pb2.VerifyRequest(name="a00"))
        found = [message async for message in call]
        results = [message.check for message in found if message.HasField("check")]
        assert results, found
        assert {check.result for check in results} <= {"passed", "skipped"}, results
