"""Budgets of serving sidecars, asked as clients ask them: one alone, and three that share through Redis."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc, gateway_pb2
from tests.kit.emulated import running_engine
from tests.kit.redis_servers import PATIENCE_S, running
from tests.kit.replica_pool import CALM_S, replicas
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.vllm_emulated import running_vllm

LIMIT = 60
LIMITS = {"limits": [{"tenant": "*", "requests_per_day": LIMIT}]}


async def granted(pool: Sequence[Serving], tenant: str, limit: int) -> int:
    """Send a request to each replica at once; return how many were answered. The others were refused for the budget."""
    ends = await asyncio.gather(*(served.ask("a00", 2, tenant=tenant) for served in pool), return_exceptions=True)
    refused = [end for end in ends if isinstance(end, BaseException)]
    for error in refused:
        assert isinstance(error, grpc.aio.AioRpcError), error
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"tenant {tenant} may send {limit} requests a day" in str(error.details())
    return len(pool) - len(refused)


async def hear(pool: Sequence[Serving]) -> None:
    """Have every replica claim in Redis what it has taken, and then hear what the others have."""
    for _ in range(2):
        await asyncio.gather(*(served.sidecar.access.budgets._sharing.ask() for served in pool))


async def all_of_it(pool: Sequence[Serving], tenant: str, limit: int) -> int:
    """Have replicas asked until a budget is used up, and some more; return how many requests were answered.

    What is refused at first, because Redis is not asked on a request's way, is granted when it is asked for again.
    """
    answered = more = 0
    async with asyncio.timeout(PATIENCE_S):
        while answered < limit or more < 10:
            more += answered >= limit
            answered += await granted(pool, tenant, limit)
            await hear(pool)  # each may take its part of what it last heard was left, however long ago that was
    return answered


async def test_three_replicas_grant_one_budget(tmp_path: Path) -> None:
    """A tenant of one replica gets all of it, one of all replicas no more; a limit set at one holds at the others."""
    write_adapters(tmp_path / "adapters", 1)
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(compute="none", shape="tiny") as engine,
        replicas(3, redis.url, [engine], tmp_path / "adapters", lease_s=CALM_S, access=LIMITS) as pool,
    ):
        await until(lambda: all("a00" in served.state.names for served in pool))
        await until(lambda: all(served.sidecar.access.budgets._sharing.replicas == 3 for served in pool))
        alone = await all_of_it(pool[:1], "alone", LIMIT)
        spread = await all_of_it(pool, "spread", LIMIT)
        print(f"granted of {LIMIT}: {alone} at one replica, {spread} at three")
        assert alone == LIMIT
        assert spread < LIMIT + len(pool), "while one leases what is left, each other one may take one request of it"
        stub = admin_pb2_grpc.AccessStub(pool[1].admin_channel)
        await stub.SetLimit(pb.Limit(tenant="fresh", requests_per_day=3))
        assert await all_of_it(pool[2:], "fresh", 3) == 3


async def test_the_base_model_has_one_budget(tmp_path: Path) -> None:
    """However a client writes it; in limits it is called base."""
    limits = {"limits": [{"adapter": "base", "requests_per_day": 2}, {"adapter": "*", "requests_per_day": 100}]}
    async with running_engine(compute="none", shape="tiny") as engine, serving([engine], access=limits) as served:
        await served.ask("", 2)
        await served.ask("base", 2)
        for name in ("", "base"):
            with pytest.raises(grpc.aio.AioRpcError, match="the base model may send 2 requests a day"):
                await served.ask(name, 2)
        async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False) as http:
            body = {"model": "base", "prompt": "x", "max_tokens": 2}
            assert (await http.post("/v1/completions", json=body)).status_code == 429


async def test_what_a_client_leaves_behind_is_given_back(tmp_path: Path) -> None:
    """Clients that leave, before and while they are answered, hold no place among the requests at once."""
    write_adapters(tmp_path / "adapters", 1)
    limits = {"limits": [{"tenant": "*", "concurrent": 2, "queued_tokens": 10_000}]}
    async with (
        running_engine(compute="none", shape="tiny", time_scale=1.0) as engine,
        serving([engine], tmp_path / "adapters", access=limits) as served,
    ):
        for _ in range(3):
            calls = [
                served.gateway.Generate(
                    gateway_pb2.GenerateRequest(
                        adapter="a00",
                        tokens=gateway_pb2.TokenIds(ids=[1, 2]),
                        max_tokens=500,
                        tenant="acme",
                        stream=True,
                    )
                )
                for _ in range(2)
            ]
            await calls[0].read()  # it is being answered
            with pytest.raises(grpc.aio.AioRpcError, match="may have 2 requests at once and has 2"):
                await until_refused(served)
            for call in calls:
                call.cancel()
            stub = admin_pb2_grpc.AccessStub(served.admin_channel)
            async with asyncio.timeout(PATIENCE_S):
                while any((await taken(stub, "acme")).values()):
                    await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", ["triton", "vllm"])
@pytest.mark.parametrize(
    ("limit", "more"),
    [("concurrent", {"n": 4}), ("concurrent", {"prompt": ["x", "y"], "n": 2}),
     ("requests_per_day", {"prompt": ["x"] * 4}), ("tokens_per_day", {"prompt": ["x"] * 40})],
)  # fmt: skip
async def test_what_never_fits_a_limit_is_invalid_on_all_kinds(kind: str, limit: str, more: dict[str, Any]) -> None:
    """To send it again would not help."""
    async with (
        running_vllm(compute="none") as (vllm, _),
        running_engine(compute="none", shape="tiny") as triton,
        serving([vllm if kind == "vllm" else triton], access={"limits": [{"tenant": "acme", limit: 3}]}) as served,
        httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False) as http,
    ):
        for members, status in ((more, 400), ({"n": 3} if limit == "concurrent" else {}, 200)):
            body = {"model": "base", "prompt": "x", "max_tokens": 1, "temperature": 1.0, **members}
            reply = await http.post("/v1/completions", json=body, headers={"x-lora-tenant": "acme"})
            assert (reply.status_code, limit in reply.text) == (status, status == 400), reply.text


async def until_refused(served: Serving) -> None:
    """Ask until a budget is used up; what was answered before came before the others."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            await served.ask("a00", 1, tenant="acme")


async def taken(stub: Any, tenant: str) -> dict[str, int]:
    [limit] = (await stub.ListLimits(pb.ListLimitsRequest(tenant=tenant))).limits
    return dict(limit.taken)


async def test_a_refusal_is_recorded_once_by_the_clients_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the log and in the audit, so that an operator finds what a client asks about."""
    caplog.set_level(logging.INFO, "sidecar.requests")
    audit = {"file": str(tmp_path / "audit.jsonl")}
    access = {"limits": [{"adapter": "base", "requests_per_day": 1}], "audit": audit}
    async with running_engine(compute="none", shape="tiny") as engine, serving([engine], access=access) as served:
        await served.ask("", 2, request_id="first")
        caplog.clear()
        with pytest.raises(grpc.aio.AioRpcError):
            await served.ask("", 2, request_id="second")
        assert [record.getMessage().count("id=second") for record in caplog.records] == [1]
    (line,) = [json.loads(text) for text in (tmp_path / "audit.denials.jsonl").read_text().splitlines()]
    assert (line["request_id"], line["action"]) == ("second", "infer")
