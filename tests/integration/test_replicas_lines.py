"""The call between two replicas that carries all requests passed on: nobody's answer waits for another's client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from sidecar.lab.engine.tokens import BOS
from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from sidecar.replicas import answering, peers
from sidecar.replicas.answering import PassedOn
from tests.kit.emulated import running_engine
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, owned, replicas
from tests.kit.serving import PATIENCE_S, Serving, until, write_adapters

ENGINE = {"compute": "none", "shape": "tiny", "seats": 64, "kv_blocks": 1 << 16}
LONG = 6000
"""Tokens whose messages fit in no window of a connection."""
ROOM_BYTES = 4096
"""What an answer may have waiting for its client, before the owner is told to wait."""


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    write_adapters(tmp_path / "adapters", 4)
    return tmp_path / "adapters"


@asynccontextmanager
async def slow_gateway(served: Serving) -> AsyncIterator[Any]:
    """A way to a replica that takes next to nothing before it is read."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    async with grpc.aio.insecure_channel(served.sidecar.data_address, options=options) as channel:
        yield gateway_pb2_grpc.GatewayStub(channel)


@asynccontextmanager
async def owner_and_other(folder: Path, adapters: Path) -> AsyncIterator[tuple[Serving, Serving]]:
    async with (
        running(folder / "redis") as redis,
        running_engine(**ENGINE) as one,
        replicas(2, redis.url, [one], adapters, lease_s=CALM_S, queue={"answer_bytes_max": ROOM_BYTES}) as pool,
        asyncio.timeout(2 * PATIENCE_S),
    ):
        (owner,) = [served for served in pool if owned(served)]
        (other,) = [served for served in pool if served is not owner]
        yield owner, other


def passed_on(owner: Serving) -> list[PassedOn]:
    return [ticket for ticket in owner.sidecar.gateway.tickets.values() if isinstance(ticket, PassedOn)]


async def test_a_slow_client_holds_up_nobody_else(adapters: Path, tmp_path: Path) -> None:
    """Its answer waits at the owner, others go on by the same call, and in the end it has all of it."""
    async with owner_and_other(tmp_path, adapters) as (owner, other), slow_gateway(other) as gateway:
        ids = gateway_pb2.TokenIds(ids=[BOS, 1, 2])
        request = gateway_pb2.GenerateRequest(adapter="a00", tokens=ids, max_tokens=LONG)
        slow = aiter(gateway.Generate(request))
        tokens = [*(await anext(slow)).token_ids]
        await until(lambda: any(ticket.paused for ticket in passed_on(owner)))
        answers = await asyncio.gather(*(other.ask(f"a{number % 4:02}", tokens=20) for number in range(16)))
        assert all(answer.tokens == other.expected(f"a{number % 4:02}", 20) for number, answer in enumerate(answers))
        # Until all windows of its connection are full it is paused and resumed in turn; then it stays paused.
        await until(lambda: any(ticket.paused for ticket in passed_on(owner)))
        async for response in slow:
            tokens += response.token_ids
        assert tokens == other.expected("a00", LONG)
        await until(lambda: not passed_on(owner))


async def test_a_client_that_leaves_frees_its_seat_at_the_owner(adapters: Path, tmp_path: Path) -> None:
    """Whether it was slow or not; the call goes on for the others."""
    async with owner_and_other(tmp_path, adapters) as (owner, other), slow_gateway(other) as gateway:
        ids = gateway_pb2.TokenIds(ids=[BOS, 1, 2])
        request = gateway_pb2.GenerateRequest(adapter="a00", tokens=ids, max_tokens=LONG)
        leaving = [gateway.Generate(request) for _ in range(4)]
        for call in leaving:
            await call.read()
        await until(lambda: all(ticket.paused for ticket in passed_on(owner)))
        for call in leaving:
            call.cancel()
        await until(lambda: not passed_on(owner) and not owner.state.requests)
        assert (await other.ask("a01")).tokens == other.expected("a01", 4)


async def test_a_large_request_has_a_call_of_its_own(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the request, and the shared one stays."""
    async with owner_and_other(tmp_path, adapters) as (_, other):
        await other.ask("a00")
        shared = set(other.sidecar.replica.peers._calls)
        assert len(shared) == 1
        monkeypatch.setattr(peers, "LARGE_BYTES", 0)
        answers = await asyncio.gather(*(other.ask("a01") for _ in range(8)))
        assert all(answer.tokens == other.expected("a01", 4) for answer in answers)
        await until(lambda: set(other.sidecar.replica.peers._calls) == shared)


async def test_engines_are_read_no_further_than_the_other_replica_takes(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With next to no room every answer still comes whole."""
    monkeypatch.setattr(answering, "UNSENT_BYTES_MAX", 1)
    async with owner_and_other(tmp_path, adapters) as (_, other):
        answers = await asyncio.gather(*(other.ask(f"a{number % 4:02}", tokens=100) for number in range(16)))
        assert all(answer.tokens == other.expected(f"a{number % 4:02}", 100) for number, answer in enumerate(answers))


async def test_one_request_that_cannot_be_read_ends_alone(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer replica may say what this one has never heard of."""
    async with owner_and_other(tmp_path, adapters) as (_, other):
        read = answering.forms.payload_of

        def refuses(request: object) -> object:
            if answering.forms.facts_of(request).adapter == "a01":
                raise ValueError("'song' is not a valid Prompt")
            return read(request)

        monkeypatch.setattr(answering.forms, "payload_of", refuses)
        fine, not_read = other.ask("a00"), other.ask("a01")
        results = await asyncio.gather(fine, not_read, return_exceptions=True)
        assert results[0].tokens == other.expected("a00", 4)  # type: ignore[union-attr]
        assert isinstance(results[1], grpc.aio.AioRpcError)
        assert "song" in (results[1].details() or "")
