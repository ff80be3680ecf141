"""Prompts in text: an engine's own count of one is charged and counts as used; without one it is an estimate."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc
from tests.kit.peft_files import write_adapter
from tests.kit.redis_servers import PATIENCE_S, running
from tests.kit.replica_pool import CALM_S, owned, replicas
from tests.kit.serving import Serving, until
from tests.kit.vllm_emulated import running_vllm

LIMITS = {"limits": [{"tenant": "*", "tokens": "input", "tokens_per_day": 1_000_000}]}
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
