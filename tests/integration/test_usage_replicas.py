"""Usage of several replicas: each counts the engines that it owns, and together they count everything once."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc, gateway_pb2
from tests.kit.emulated import running_engine
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, owned, replicas
from tests.kit.serving import Serving, until, write_adapters

DUMMY = {"compute": "none", "shape": "tiny"}
TEXT = "as text"


async def rows_of(served: Serving) -> list[Any]:
    request = pb.UsageRequest(by=["tenant", "adapter", "backend"])
    return list((await admin_pb2_grpc.AccessStub(served.admin_channel).GetUsage(request)).rows)


async def ask_in_text(served: Serving, name: str) -> None:
    request = gateway_pb2.GenerateRequest(adapter=name, text=TEXT, max_tokens=3, tenant="texts")
    async for _ in served.gateway.Generate(request):
        pass


async def test_together_they_count_everything_once(tmp_path: Path) -> None:
    """Forwarded requests count at the owner of the backend, under their tenants; so do estimates."""
    names = write_adapters(tmp_path / "adapters", 6)
    async with (
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY) as one,
        running_engine(**DUMMY) as two,
        replicas(3, redis.url, [one, two], tmp_path / "adapters", lease_s=CALM_S) as pool,
    ):
        await until(lambda: all(set(names) <= set(served.state.names) for served in pool))
        asked = [(number, name) for number in range(3) for name in names]
        await asyncio.gather(
            *(pool[number].ask(name, 4, prompt=6, tenant=f"via-{number}") for number, name in asked),
            *(ask_in_text(served, names[0]) for served in pool),
        )
        for served in pool:
            with pytest.raises(grpc.aio.AioRpcError):
                await served.ask("no-such", 3, tenant="lost")
        assert sum(served.sidecar.replica.router.forwards for served in pool) > 0
        answered: Counter[str] = Counter()
        tokens: Counter[tuple[str, str]] = Counter()
        refused = 0
        for served in pool:
            for row in await rows_of(served):
                answered[row.tenant] += int(row.requests["ok"]) if "ok" in row.requests else 0
                refused += int(row.requests["refused"]) if "refused" in row.requests else 0
                tokens[row.tenant, "all"] += row.input_tokens
                tokens[row.tenant, "estimated"] += row.input_tokens_estimated
                if row.seat_seconds and row.tenant != "(idle)":  # one may have had an engine before another came
                    assert row.backend in owned(served)
        assert dict(+answered) == {"via-0": 6, "via-1": 6, "via-2": 6, "texts": 3}
        assert refused == 3
        assert tokens["via-1", "all"] == 6 * 6
        assert tokens["via-1", "estimated"] == 0
        assert tokens["texts", "all"] == tokens["texts", "estimated"] == 3 * len(TEXT)
