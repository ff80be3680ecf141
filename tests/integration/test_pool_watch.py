"""The streamed view of the pool: each page, its order and filter, what it costs when nobody looks, who may see what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from sidecar.shell.flow import TokenRates
from tests.kit.cli_runs import runner
from tests.kit.cli_served import Served, serve_here
from tests.kit.serving import PATIENCE_S, until

QUICK_S = 0.2
TENANTS = ("acme", "acme", "acme", "beta")


@pytest.fixture
async def served(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> AsyncIterator[Served]:
    """Two backends, of which the first is up and has two seats; four requests for "slow", two of them wait."""
    async for served in serve_here(tmp_path, runner(capfd)):
        await served.register("slow", tmp_path)
        await served.register("quick", tmp_path, seed=1)
        async with grpc.aio.insecure_channel(served.address) as channel:
            stub: Any = gateway_pb2_grpc.GatewayStub(channel)
            calls = [await begun(served, stub, f"r{number}", tenant) for number, tenant in enumerate(TENANTS[:2])]
            # While "slow" is loaded all four would wait, and the tenants would share the seats.
            await until(partial(all_run, served))
            calls += [await begun(served, stub, f"r{number}", tenant) for number, tenant in enumerate(TENANTS[2:], 2)]
            yield served
            for call in calls:
                call.cancel()


def all_run(served: Served) -> bool:
    return all(each.running for each in served.gateway.state.requests.values())


async def begun(served: Served, stub: Any, request_id: str, tenant: str) -> Any:
    """Send a request and return its call once the core has it."""
    call = stub.Generate(
        gateway_pb2.GenerateRequest(adapter="slow", text="hi", request_id=request_id, tenant=tenant, max_tokens=16)
    )
    await until(lambda: request_id in {each.client_id for each in served.gateway.state.requests.values()})
    return call


@asynccontextmanager
async def watching(served: Served, **fields: Any) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub: Any = admin_pb2_grpc.PoolStub(channel)
        call = stub.Watch(pb.WatchPoolRequest(interval_s=QUICK_S, **fields))
        try:
            yield call
        finally:
            call.cancel()


async def first_view(served: Served, **fields: Any) -> Any:
    async with watching(served, **fields) as call:
        return await call.read()


async def refusal(served: Served, **fields: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await first_view(served, **fields)
    return caught.value.code().name, caught.value.details() or ""


def observes(served: Served) -> bool:
    return any(isinstance(each, TokenRates) for each in served.gateway.driver._observers)


async def test_every_page_has_the_totals_and_its_rows(served: Served) -> None:
    queue = await first_view(served)
    assert (queue.waiting, queue.running, queue.backends, queue.backends_serving, queue.adapters) == (2, 2, 2, 1, 2)
    assert queue.verdict.startswith("trt-1 is down; 2 waiting, the oldest for ")
    assert [(g.adapter, g.tenant, g.backend, g.waiting, g.running) for g in queue.groups] == [
        ("slow", "acme", "trt-0", 1, 2),
        ("slow", "beta", "trt-0", 1, 0),
    ]
    assert (queue.seats, queue.seats_assumed) == (4, False)
    backends = await first_view(served, page="backends")
    assert [(row.backend.id, row.backend.running, row.backend.queued) for row in backends.backend_rows] == [
        ("trt-1", 0, 0),  # it is down, so it comes first
        ("trt-0", 2, 2),
    ]
    assert not backends.backend_rows[0].HasField("silent_s")
    assert backends.backend_rows[1].HasField("silent_s")
    adapters = await first_view(served, page="adapters")
    rows = {row.name: row for row in adapters.adapter_rows}
    assert adapters.rows_total == len(rows) == 2
    assert (rows["slow"].version, rows["slow"].waiting, rows["slow"].running, rows["slow"].on_gpu) == ("v1", 2, 2, 1)
    assert rows["slow"].oldest.tenant == "acme"
    assert (rows["quick"].waiting, rows["quick"].running, rows["quick"].on_gpu) == (0, 0, 0)
    tenants = await first_view(served, page="tenants")
    assert {row.tenant: (row.waiting, row.running, row.weight) for row in tenants.tenant_rows} == {
        "acme": (1, 2, 1.0),
        "beta": (1, 0, 1.0),
    }
    requests = await first_view(served, page="requests")
    assert [(row.request_id, row.state) for row in requests.request_rows] == [
        ("r0", "running"),
        ("r1", "running"),
        ("r2", "waiting"),
        ("r3", "waiting"),
    ]


async def test_rows_are_sorted_filtered_and_cut(served: Served) -> None:
    by_name = await first_view(served, page="adapters", sort="name")
    assert [row.name for row in by_name.adapter_rows] == ["quick", "slow"]
    second = await first_view(served, page="adapters", sort="waiting", offset=1, limit=1)
    assert ([row.name for row in second.adapter_rows], second.rows_total) == (["quick"], 2)
    assert [row.name for row in (await first_view(served, page="adapters", filter="QUI")).adapter_rows] == ["quick"]
    assert [row.request_id for row in (await first_view(served, page="requests", filter="beta")).request_rows] == ["r3"]
    assert [g.tenant for g in (await first_view(served, filter="beta")).groups] == ["beta"]
    down = (await first_view(served, page="backends", filter="down")).backend_rows
    assert [row.backend.id for row in down] == ["trt-1"]
    calm = (await first_view(served, page="backends", sort="name")).backend_rows
    assert [row.backend.id for row in calm] == ["trt-0", "trt-1"]


async def test_groups_by_name(served: Served, tmp_path: Path) -> None:
    """By adapter, tenant and backend, however many of them run."""
    async with grpc.aio.insecure_channel(served.address) as channel:
        call = await begun(served, gateway_pb2_grpc.GatewayStub(channel), "r4", "aaron")
        await until(lambda: sum(each.running for each in served.gateway.state.requests.values()) == 2)
        groups = (await first_view(served, sort="name")).groups
        assert [(g.tenant, g.running) for g in groups] == [("aaron", 0), ("acme", 2), ("beta", 0)]
        call.cancel()


async def test_the_requests_of_one_row(served: Served) -> None:
    """Names are compared whole; an empty one is of requests that have none."""
    for only, wanted in (
        ({"adapter": "slow", "tenant": "acme", "backend": "trt-0"}, ["r0", "r1", "r2"]),
        ({"tenant": "beta"}, ["r3"]),
        ({"adapter": "slo"}, []),
        ({"adapter": "slow", "tenant": "acme", "backend": ""}, []),
    ):
        view = await first_view(served, page="requests", only=pb.RequestNames(**only))
        assert [row.request_id for row in view.request_rows] == wanted


async def test_what_is_not_there_is_refused(served: Served) -> None:
    assert await refusal(served, page="nosuch") == (
        "INVALID_ARGUMENT",
        'page is "nosuch"; it is one of queue, backends, adapters, tenants, requests',
    )
    assert (await refusal(served, sort="nosuch"))[1].startswith('sort is "nosuch"; it is one of name, waiting, ')
    code, text = await refusal(served, page="backends", lanes_of="trt-9")
    assert (code, '"trt-9"' in text, "trt-0" in text) == ("NOT_FOUND", True, True)
    for odd in ({"page": "\x1b[2J"}, {"sort": "\x1b[2J"}, {"page": "backends", "lanes_of": "\x1b[2J"}):
        assert (await refusal(served, **odd))[1].isprintable()


async def test_tokens_are_counted_only_while_somebody_watches(served: Served) -> None:
    assert not observes(served)
    async with watching(served, page="adapters") as first:
        assert not (await first.read()).HasField("tokens_per_s")
        assert observes(served)
        async with watching(served) as second:
            await second.read()
        assert observes(served)  # the other one still looks
        async with asyncio.timeout(PATIENCE_S):
            while not (view := await first.read()).HasField("tokens_per_s"):
                pass
        for request in ("r0", "r1", "r2", "r3"):
            await served.cli("requests", "cancel", request)
        assert (await served.cli("generate", "quick", "hi")).code == 0
        async with asyncio.timeout(PATIENCE_S):
            while not (view := await first.read()).tokens_per_s:
                pass
        rates = {row.name: row.tokens_per_s for row in view.adapter_rows}
        assert rates["quick"] > 0
        assert rates["slow"] == 0
    await until(lambda: not observes(served))


async def test_the_last_minute_of_each_slot(served: Served) -> None:
    async with watching(served, page="backends", lanes_of="trt-0") as call, asyncio.timeout(PATIENCE_S):
        while not (view := await call.read()).lanes:
            pass
    (lane,) = view.lanes
    assert list(lane.names) == ["slow"]
    assert lane.held[-1] == 1
