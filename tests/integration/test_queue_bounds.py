"""A queue that is full, or too slow for a request: what clients are told, on both fronts, and when to come back."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from sidecar.core.events import Received
from sidecar.core.lengths import Answers
from sidecar.proto import gateway_pb2
from tests.kit.emulated import core_request, running_engine
from tests.kit.kserve_clients import DUMMY
from tests.kit.serving import Serving, serving, until

COST = "llama-3.1-8b/a100_sxm/trtllm"
ANSWER = 4000
"""Tokens of an answer that takes the engine, in real time, far longer than any test."""
INFER = "/inference.GRPCInferenceService/ModelInfer"
FRONTS = ("Generate", "ModelInfer")


def generate_request(tenant: str, **fields: Any) -> Any:
    tokens = gateway_pb2.TokenIds(ids=[1, 2, 3, 4, 5])
    return gateway_pb2.GenerateRequest(tokens=tokens, max_tokens=ANSWER, tenant=tenant, **fields)


def infer_request(tenant: str, **parameters: Any) -> Any:
    return core_request("hell", ANSWER, lora_tenant=tenant, **parameters)  # five tokens, too


async def refusal(served: Serving, front: str, tenant: str = "red", deadline_ms: int = 0) -> tuple[Any, Any, float]:
    """Return the error that a request ends with at once, its ErrorInfo, and after how many seconds to come back."""
    if front == "Generate":
        call: Any = served.gateway.Generate(generate_request(tenant, deadline_ms=deadline_ms)).read()
    else:
        parameters = {"lora_deadline_ms": deadline_ms} if deadline_ms else {}
        call = served.channel.unary_unary(INFER)(infer_request(tenant, **parameters).SerializeToString())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)
    assert status is not None
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    pushback = dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]
    assert int(pushback) == retry.retry_delay.ToMilliseconds()
    return caught.value, info, retry.retry_delay.ToMilliseconds() / 1000


@asynccontextmanager
async def one_runs_and_one_waits(engine: dict[str, Any] | None = None, **queue: Any) -> AsyncIterator[Serving]:
    """Serve an engine of one seat, which tenant red has taken, with one more request of red's in the queue."""
    async with (
        running_engine(**DUMMY, time_scale=1.0) as emulated,
        serving([emulated], backend={"engine": {"seats": 1} | (engine or {})}, queue=queue) as served,
    ):
        served.state.answers = Answers(1.0, ANSWER)  # one has used all it might, which would take half a minute here
        calls = [served.gateway.Generate(generate_request("red")) for _ in range(2)]
        readers = [asyncio.ensure_future(call.read()) for call in calls]
        await until(lambda: served.state.queued == 1 and len(served.state.backends["trt-0"].running) == 1)
        yield served
        for call in calls:
            call.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


SIZES = {"Generate": generate_request("red").ByteSize(), "ModelInfer": infer_request("red").ByteSize()}
TOKENS = 5 + ANSWER


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("of_tenant", [False, True])
@pytest.mark.parametrize("unit", ["requests", "tokens", "bytes"])
async def test_a_full_queue(unit: str, of_tenant: bool, front: str) -> None:
    """Past each bound a request is refused with RESOURCE_EXHAUSTED and a retry delay; another tenant's may fit."""
    limit = {"requests": 1, "tokens": 2 * TOKENS - 1, "bytes": SIZES["Generate"] + SIZES[front] - 1}[unit]
    key = {"requests": "queued_max", "tokens": "queued_tokens_max", "bytes": "queued_bytes_max"}[unit]
    async with one_runs_and_one_waits(**{f"tenant_{key}" if of_tenant else key: limit}) as served:
        error, info, retry_s = await refusal(served, front)
        assert (error.code(), info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert retry_s > 0
        held = {"requests": 1, "tokens": TOKENS, "bytes": SIZES["Generate"]}[unit]
        assert f"{held} {unit}" in (error.details() or "")
        assert f"(limit {limit})" in (error.details() or "")
        if not of_tenant:
            assert (await refusal(served, front, tenant="blue"))[1].reason == "QUEUE_FULL"
            return
        call = served.gateway.Generate(generate_request("blue"))
        await until(lambda: served.state.queued == 2)
        call.cancel()


async def test_the_size_is_the_clients_message() -> None:
    """What counts towards the bounds by bytes is what came over the wire, on each front."""
    async with one_runs_and_one_waits() as served:
        raw = infer_request("blue").SerializeToString()
        call = served.channel.unary_unary(INFER)(raw)
        await until(lambda: served.state.queued == 2)
        sizes = [event.size_bytes for event in served.recorder.events if isinstance(event, Received)]
        assert sizes == [SIZES["Generate"], SIZES["Generate"], len(raw)]
        assert served.state.waiting.size_bytes == SIZES["Generate"] + len(raw)
        call.cancel()


@pytest.mark.parametrize("front", FRONTS)
async def test_a_wait_that_is_predicted_to_be_too_long(front: str) -> None:
    """An engine whose pace is known: past the class's longest wait a request may come back when that is over."""
    classes = {"default": {"queue_wait_s_max": 120, "patience_s": 1}}
    async with one_runs_and_one_waits({"cost": COST}, classes=classes) as served:
        error, info, retry_s = await refusal(served, front)
        assert (error.code(), info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        told = re.search(r"is (\d+) s and class \"default\" allows 120 s", error.details() or "")
        assert told is not None
        assert int(told[1]) > 120
        assert retry_s == pytest.approx(int(told[1]) - 120, abs=0.6)


@pytest.mark.parametrize("front", FRONTS)
async def test_a_deadline_that_cannot_be_met(front: str) -> None:
    """The same wait is held against the request's own deadline, whatever its class allows."""
    async with one_runs_and_one_waits({"cost": COST}) as served:
        error, info, _ = await refusal(served, front, deadline_ms=5000)
        assert (error.code(), info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DEADLINE_UNMEETABLE")
        assert "the deadline is in 5.0 s" in (error.details() or "")
