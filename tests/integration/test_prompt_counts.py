"""Prompts in text: an engine's own count of one is charged and counts as used; without one it is an estimate."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from tritonclient.grpc import service_pb2_grpc

from sidecar.access.budgets import counting
from sidecar.access.budgets.counting import PromptCounter
from sidecar.errors import Misused
from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc, gateway_pb2
from tests.kit.cases import needs
from tests.kit.emulated import running_engine, stream_answers, text_request
from tests.kit.faults import ENDLESS
from tests.kit.peft_files import BASE_MODEL, write_adapter
from tests.kit.redis_servers import PATIENCE_S, running
from tests.kit.replica_pool import CALM_S, owned, replicas
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.vllm_emulated import running_vllm

LIMITS = {"limits": [{"tenant": "*", "tokens": "input", "tokens_per_day": 1_000_000}]}
LONG = 200
WORDS = "a text whose bytes are many more than its tokens, as texts are"


async def complete(served: Serving, tenant: str, **more: Any) -> list[dict[str, Any]]:
    """Send a text and return the answer, or its events."""
    body = {"model": "sql", "prompt": WORDS, "max_tokens": 4, **more}
    async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}") as client:
        answer = await client.post("/v1/completions", json=body, headers={"x-lora-tenant": tenant})
    assert answer.status_code == 200, answer.text
    lines = answer.text.split("\n\n") if more.get("stream") else [answer.text]
    texts = [line.removeprefix("data: ") for line in lines]
    return [json.loads(text) for text in texts if text and text != "[DONE]"]


async def wait_until_charged(pool: list[Serving], tenant: str, tokens: int) -> None:
    """Wait until every replica says that a tenant has taken so much; what another has leased ahead comes back first."""
    async with asyncio.timeout(PATIENCE_S):
        for served in pool:
            stub = admin_pb2_grpc.AccessStub(served.admin_channel)
            while True:
                [limit] = (await stub.ListLimits(pb.ListLimitsRequest(tenant=tenant))).limits
                if limit.taken["tokens_per_day"] == tokens:
                    break
                await asyncio.sleep(0.1)


async def test_an_engines_count_is_charged_at_every_replica(tmp_path: Path) -> None:
    """Whether the replica that is asked owns the engine or passes the request on; for whole answers and for streams."""
    write_adapter(tmp_path / "adapters" / "sql")
    async with (
        running(tmp_path / "redis") as redis,
        running_vllm(compute="none", max_loras=2) as (engine, _),
        replicas(
            2, redis.url, [engine], tmp_path / "adapters", lease_s=CALM_S, access=LIMITS,
            backend={"adapters_dir": str(tmp_path / "shared")},
        ) as pool,
    ):  # fmt: skip
        await until(lambda: all("sql" in served.state.names for served in pool))
        assert sorted(bool(owned(served)) for served in pool) == [False, True]
        counted: Counter[str] = Counter()
        for number, served in enumerate(pool):
            for what, more in (
                ("whole", {}),
                ("streamed", {"stream": True, "stream_options": {"include_usage": True}}),
            ):
                answer = await complete(served, f"{what}-{number}", **more)
                counted[f"{what}-{number}"] = answer[-1]["usage"]["prompt_tokens"]
        for tenant, tokens in counted.items():
            await wait_until_charged(pool, tenant, tokens)
        await complete(pool[0], "untold", stream=True)
        used: Counter[str] = Counter()
        estimated: Counter[str] = Counter()
        for served in pool:
            request = pb.UsageRequest(by=["tenant"])
            for row in (await admin_pb2_grpc.AccessStub(served.admin_channel).GetUsage(request)).rows:
                used[row.tenant] += row.input_tokens
                estimated[row.tenant] += row.input_tokens_estimated
        assert {tenant: used[tenant] for tenant in counted} == counted
        assert {tenant for tenant, tokens in estimated.items() if tokens} == {"untold"}


def write_tokenizer(file: Path) -> Path:
    """Write a tokenizer of words that puts one token before each text, as Llama's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "[UNK]": 1}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(file))
    return file


@needs("tokenizers", "tokenizer")
async def test_a_models_tokenizer_counts_where_the_engine_does_not(tmp_path: Path) -> None:
    """Triton tells no counts of streams: texts of each protocol are charged, and used, as the tokenizer counts.

    The answers last: a count that comes after its request has ended leaves an estimate.
    """
    write_adapters(tmp_path / "adapters", 1)
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    backend = {"base_model": {"name": BASE_MODEL, "tokenizer": str(tokenizer)}}
    async with (
        running_engine(compute="none", shape="tiny", **ENDLESS) as engine,
        serving([engine], tmp_path / "adapters", access=LIMITS, backend=backend) as served,
    ):
        words = " ".join("word" for _ in range(29))
        request = gateway_pb2.GenerateRequest(adapter="a00", text=words, max_tokens=LONG, tenant="generate")
        async for _ in served.gateway.Generate(request):
            pass
        message = text_request(words, LONG, streaming=True, lora_name="a00", lora_tenant="kserve")
        await stream_answers(service_pb2_grpc.GRPCInferenceServiceStub(served.channel), message)
        body = {"model": "a00", "prompt": words, "max_tokens": LONG, "stream": True}
        async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}") as client:
            await client.post("/v1/completions", json=body, headers={"x-lora-tenant": "openai"})
        for tenant in ("generate", "kserve", "openai"):
            await wait_until_charged([served], tenant, 30)
        request = pb.UsageRequest(by=["tenant"])
        rows = (await admin_pb2_grpc.AccessStub(served.admin_channel).GetUsage(request)).rows
        assert {row.tenant: row.input_tokens for row in rows if row.input_tokens} == {
            "generate": 30, "kserve": 30, "openai": 30,
        }  # fmt: skip
        assert not any(row.input_tokens_estimated for row in rows)


@needs("tokenizers", "tokenizer")
@pytest.mark.parametrize(("content", "words"), [(None, "No such file"), ("{}", "is no tokenizer.json")])
async def test_a_tokenizer_that_is_none_is_named_at_the_start(content: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(Misused, match=rf"tokenizer .*tokenizer\.json.*{words}"):
        PromptCounter({"base": file})


@needs("tokenizers", "tokenizer")
async def test_too_much_text_at_once_stays_an_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts wait for one thread. Of more than it may hold none is taken; later ones are counted again."""
    counter = PromptCounter({"base": write_tokenizer(tmp_path / "tokenizer.json")})
    monkeypatch.setattr(counting, "WAITING_CHARACTERS_MAX", 20)
    counted: list[int] = []
    for text in ("one two three", "four five six", "seven"):
        counter.count("another name", text, counted.append)
    await until(lambda: len(counted) == 2)
    assert counted == [4, 2]
    counter.count("base", "four five six", counted.append)
    await until(lambda: len(counted) == 3)
    assert counted == [4, 2, 4]
    counter.close()
