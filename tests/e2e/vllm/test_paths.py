"""The other paths of the API by an adapter's name, by unmodified SDKs: each answer is vLLM's own to that adapter."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.backends.openai.paths import ROWS
from sidecar.proto import admin_pb2
from tests.e2e.vllm.direct import http_client, load
from tests.e2e.vllm.fronted import in_front
from tests.e2e.vllm.installed import chosen
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import NAMES, Toy

ASKED = NAMES[:4]
SCORES: dict[str, dict[str, Any]] = {
    "/v1/pooling": {"input": "def quicksort(items):"},
    "/v1/score": {"queries": "def quicksort(items):", "documents": ["sort", "walk"]},
    "/v1/rerank": {"query": "def quicksort(items):", "documents": ["sort", "walk"]},
}


@pytest.fixture(scope="module")
def _pooling(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> VllmServer:
    return VllmServer(tmp_path_factory.mktemp("pooling"), toy.model, more=["--runner", "pooling", "--convert", "embed"])


@pytest.fixture
async def pooling(_pooling: VllmServer) -> AsyncIterator[VllmServer]:
    """A server of the same model that embeds."""
    async with _pooling:
        yield _pooling


async def by_sdks(url: str, paths: str, *models: str) -> dict[tuple[str, str], Any]:
    """Return what the SDKs are told, by path and model."""
    installed = chosen().find()
    asking = await asyncio.create_subprocess_exec(
        *installed.script("ask_sdks.py", url, paths, *models),
        env=installed.environment(),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await asking.communicate()
    records = [json.loads(line) for line in out.splitlines()]
    return {(each.pop("path"), each.pop("asked")): each for each in records}


async def test_responses_and_messages(server: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """By name, for the base model and for nobody; whole and streamed; by the SDKs of OpenAI and Anthropic."""
    paths = "responses,messages"
    async with http_client(server.http_address) as direct:
        for name in ASKED[:2]:
            await load(direct, f"own-{name}", toy.adapters / name)
    wanted = await by_sdks(server.url, paths, "base", *(f"own-{name}" for name in ASKED[:2]))
    async with in_front(server, toy.adapters, tmp_path) as front:
        url = f"http://{front.served.sidecar.http_address}"
        found = await by_sdks(url, paths, "base", *ASKED[:2], "nobody")
    for path in paths.split(","):
        assert (found[path, "nobody"]["status"], "unknown adapter" in str(found[path, "nobody"])) == (404, True)
        for name in ("base", *ASKED[:2]):
            told, own = found[path, name], wanted[path, name if name == "base" else f"own-{name}"]
            assert (told["model"], told["models"]) == (name, [name])
            assert told["text"] == told["streamed"] == own["text"]
            assert (told["last"], told["input_tokens"]) == (own["last"], own["input_tokens"])
            assert told["output_tokens"] == own["output_tokens"] == 8
    assert len({each["text"] for each in wanted.values()}) == 3, "adapters answer alike"


@pytest.mark.nightly
async def test_embeddings_and_scores(pooling: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """Four adapters over two slots; an adapter is verified by what the pooler makes; completions are refused."""

    async def scores(client: httpx.AsyncClient, name: str, at_engine: bool) -> list[Any]:
        told = []
        for path, body in SCORES.items():
            reply = await client.post(ROWS[path].at_engine if at_engine else path, json=body | {"model": name})
            assert reply.status_code == httpx.codes.OK, reply.text
            record = reply.json()
            assert record["model"] == name
            told.append(record.get("data") or record["results"])
        return told

    async with in_front(pooling, toy.adapters, tmp_path) as front:
        url = f"http://{front.served.sidecar.http_address}"
        found = await by_sdks(url, "embeddings", "base", *ASKED, "nobody")
        rest = {name: await scores(front.client, name, False) for name in ("base", *ASKED)}
        report = front.served.adapters.Verify(admin_pb2.VerifyRequest(name=ASKED[0]))
        checks = [each.check for each in [each async for each in report] if each.HasField("check")]
        assert ("changes", "passed") in {(each.check, each.result) for each in checks}, checks
        reply = await front.client.post("/v1/completions", json={"model": ASKED[0], "prompt": "x"})
        assert (reply.status_code, "does not have this path" in reply.text) == (501, True), reply.text
    assert found["embeddings", "nobody"]["status"] == httpx.codes.NOT_FOUND
    async with http_client(pooling.http_address) as direct:
        for name in ASKED:
            await load(direct, f"own-{name}", toy.adapters / name)
            wanted = await by_sdks(pooling.url, "embeddings", f"own-{name}", "base")
            assert found["embeddings", name]["vectors"] == wanted["embeddings", f"own-{name}"]["vectors"]
            assert found["embeddings", "base"]["vectors"] == wanted["embeddings", "base"]["vectors"]
            assert rest[name] == await scores(direct, f"own-{name}", True)
    assert len({str(each["vectors"]) for each in found.values() if "vectors" in each}) == 5, "adapters embed alike"
