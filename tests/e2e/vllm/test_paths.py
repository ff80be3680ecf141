"""The other paths of the API by an adapter's name, by unmodified SDKs: each answer is vLLM's own to that adapter."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

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


@pytest.fixture
async def pooling(request: pytest.FixtureRequest, toy: Toy, tmp_path: Path) -> AsyncIterator[VllmServer]:
    """A server of the same model that embeds, or one with a head that classifies."""
    model, more = toy.model, ["--runner", "pooling", "--convert", "embed"]
    if request.param == "classify":
        model, more = classifier(toy.model, tmp_path / "classifier"), ["--runner", "pooling"]
    async with VllmServer(tmp_path, model, more=more) as server:
        yield server


def classifier(model: Path, folder: Path) -> Path:
    """Make a model for two classes of a decoder: a head of random weights in place of its own."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    hidden = tensors.pop("lm_head.weight").shape[1]
    tensors["score.weight"] = np.random.default_rng(1).normal(0.0, 0.5, (2, hidden)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    classes = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    (folder / "config.json").write_text(json.dumps(config | classes))
    return folder


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
@pytest.mark.parametrize("pooling", ["embed"], indirect=True)
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


@pytest.mark.nightly
@pytest.mark.parametrize("pooling", ["classify"], indirect=True)
async def test_classes(pooling: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """Each adapter's own probabilities; embeddings are refused by a server that classifies."""
    body = {"input": ["def quicksort(items):", "hello", "one two three"]}
    async with in_front(pooling, toy.adapters, tmp_path) as front, http_client(pooling.http_address) as direct:
        for name in ("base", *ASKED):
            own = name if name == "base" else f"own-{name}"
            if name != "base":
                await load(direct, own, toy.adapters / name)
            reply = await front.client.post("/v1/classify", json=body | {"model": name})
            wanted = await direct.post("/classify", json=body | {"model": own})
            assert reply.status_code == wanted.status_code == httpx.codes.OK, reply.text
            assert (reply.json()["model"], reply.json()["data"]) == (name, wanted.json()["data"])
        reply = await front.client.post("/v1/embeddings", json=body | {"model": ASKED[0]})
        assert (reply.status_code, "has /v1/classify, /v1/pooling" in reply.text) == (501, True), reply.text
