"""Helpers for tests of faults: other clients of an engine, answers that may fail, and checks that nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest

from sidecar.core.effects import Heal
from sidecar.lab.engine.tokens import BOS
from sidecar.proto import gateway_pb2
from tests.kit.emulated import add_lora, channel_to, core_request, random_adapter, stream_answers
from tests.kit.serving import Serving, until

DUMMY: dict[str, Any] = {"compute": "none", "shape": "tiny"}
LONG = 900_000
"""The tokens of a request that ends only when cancelled, on an engine with the options of `ENDLESS`."""
ENDLESS: dict[str, Any] = {"max_seq_tokens": 1_000_000, "kv_blocks": 1 << 20, "time_scale": 0.2}


@dataclass
class Tried:
    """A client's result: tokens, and the origin of a complete answer or the error."""

    name: str
    tokens: list[int] = field(default_factory=list)
    origins: list[Any] = field(default_factory=list)
    error: grpc.aio.AioRpcError | None = None

    @property
    def words(self) -> str:
        return "" if self.error is None else self.error.details() or ""


async def attempt(served: Serving, name: str, tokens: int = 4, **fields: Any) -> Tried:
    """Send one request, and keep the tokens received even if the answer breaks off."""
    tried = Tried(name)
    ids = gateway_pb2.TokenIds(ids=[BOS, 1, 2, 3])
    request = gateway_pb2.GenerateRequest(adapter=name, tokens=ids, max_tokens=tokens, **fields)
    call = served.gateway.Generate(request)
    try:
        async for response in call:
            tried.tokens += response.token_ids
            if response.HasField("origin"):
                tried.origins.append(response.origin)
    except grpc.aio.AioRpcError as error:
        tried.error = error
    finally:
        call.cancel()  # as in Serving.ask_tokens
    return tried


def assert_right(served: Serving, tried: Tried, tokens: int = 4) -> None:
    """Assert that the answer is complete, the adapter's own, and was given once."""
    assert tried.error is None, tried.words
    assert tried.tokens == served.expected(tried.name, tokens)
    assert len(tried.origins) == 1


def assert_broken_off(served: Serving, tried: Tried) -> None:
    """Assert that the answer broke off after right tokens, and that its error says that it is not repeated."""
    assert tried.error is not None
    assert tried.tokens, f"failed without a token: {tried.words}"
    assert tried.tokens == served.expected(tried.name, len(tried.tokens))
    assert not tried.origins
    assert tried.error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.ABORTED)
    assert "an answer that has begun is never repeated" in tried.words


async def assert_nothing_left(served: Serving) -> None:
    """Assert that no request, seat, load or pin is held once everything has ended."""
    try:
        await until(lambda: not served.state.requests and not served.sidecar.gateway.tickets)
    except TimeoutError:
        endpoints: list[Any] = list(served.sidecar.gateway.backends.values())
        pytest.fail(
            f"left behind: {served.state.requests}, tickets {list(served.sidecar.gateway.tickets)}, "
            f"runs {[list(endpoint._runs) for endpoint in endpoints]}, last events {served.recorder.events[-20:]}"
        )
    for backend in served.state.backends.values():
        assert not backend.running
        assert not backend.loads
        assert backend.kv_reserved == 0
        assert all(not slot.running for slot in backend.slots.values())
        endpoint = served.sidecar.gateway.backends[backend.id]
        await until(lambda endpoint=endpoint: not endpoint._runs and not endpoint._loads)
    assert all(entry.pins == 0 for entry in served.state.store.entries.values())


def heals(served: Serving) -> list[str]:
    """Return the reasons of all heals so far, in order."""
    return [heal.reason for heal in served.recorder.of(Heal)]


@asynccontextmanager
async def occupied(engine: Any, count: int = 1, adapter: int | None = None) -> AsyncIterator[None]:
    """Let another client hold seats of an engine, and with `adapter` a page of its host cache, for a block."""
    before = _inside(engine)
    async with channel_to(engine.grpc_address) as stub:
        calls = []
        for number in range(count):
            request = core_request(tokens=LONG, request_id=f"other-{adapter}-{number}")
            if adapter is not None:
                add_lora(request, adapter, random_adapter(adapter))
            calls.append(stub.ModelStreamInfer())
            await calls[-1].write(request)
            await until(lambda: _inside(engine) > before + number)  # noqa: B023 — waited for in this very turn
        try:
            yield
        finally:
            for call in calls:
                call.cancel()


def _inside(engine: Any) -> int:
    counters = engine.engine.counters
    return int(counters.active + counters.waiting)


async def fill_cache(engine: Any, *task_ids: int) -> None:
    """Let another client load adapters under some task ids."""
    async with channel_to(engine.grpc_address) as stub:
        for task_id in task_ids:
            answers = await stream_answers(stub, add_lora(core_request(tokens=1), task_id, random_adapter(task_id)))
            assert not answers[0].error_message


async def gathered(*asks: Any) -> list[Tried]:
    """Run attempts concurrently."""
    return list(await asyncio.gather(*asks))
