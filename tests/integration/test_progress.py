"""What a backend tells the core of its runs' progress: which tokens came since, of which request."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from sidecar.core.events import FirstToken, Progress, RunEnded
from sidecar.proto import gateway_pb2
from tests.kit.emulated import core_request, running_engine
from tests.kit.kserve_clients import DUMMY
from tests.kit.serving import Serving, serving, until

SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096))
TOKENS = 80


def reports(served: Serving, backend: str = "trt-0") -> list[dict[int, int]]:
    return [
        event.tokens for event in served.recorder.events if isinstance(event, Progress) and event.backend == backend
    ]


def sums(served: Serving, backend: str = "trt-0") -> dict[int, int]:
    """Return how many tokens of each request were told of."""
    told: dict[int, int] = {}
    for report in reports(served, backend):
        for request, tokens in report.items():
            told[request] = told.get(request, 0) + tokens
    return told


async def test_each_report_has_what_came_since_the_last() -> None:
    """Streams at a real engine's pace are told of every 100 ms or so, each with its own tokens, never one twice."""
    async with running_engine(**DUMMY, time_scale=1.0) as engine, serving([engine]) as served:
        await asyncio.gather(served.ask("", TOKENS), served.ask("", 2 * TOKENS))
        (long_run,) = (
            e.request for e in served.recorder.events if isinstance(e, RunEnded) and e.output_tokens > TOKENS
        )
        told = sums(served)
        assert sorted(told) == sorted(e.request for e in served.recorder.events if isinstance(e, FirstToken))
        assert all(0 < tokens <= (2 if request == long_run else 1) * TOKENS for request, tokens in told.items())
        assert told[long_run] > TOKENS
        assert len(reports(served)) >= 5
        assert all(tokens > 0 for report in reports(served) for tokens in report.values())


async def test_each_backend_tells_of_its_own_runs() -> None:
    """With two engines at work no request is in the reports of both."""
    async with (
        running_engine(**DUMMY, time_scale=1.0) as one,
        running_engine(**DUMMY, time_scale=1.0) as other,
        serving([one, other], backend={"engine": {"seats": 1}}) as served,
    ):
        await asyncio.gather(*(served.ask("", TOKENS) for _ in range(2)))
        first, second = sums(served, "trt-0"), sums(served, "trt-1")
        assert first
        assert second
        assert not set(first) & set(second)


async def test_an_answer_in_one_piece_is_not_told_of() -> None:
    """Its tokens come with its end: they say nothing of how long a step takes."""
    async with running_engine(**DUMMY, time_scale=1.0, decoupled=False) as engine, serving([engine]) as served:
        infer = served.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        await infer(core_request(tokens=TOKENS).SerializeToString())
        (end,) = (event for event in served.recorder.events if isinstance(event, RunEnded))
        assert end.output_tokens == TOKENS
        assert reports(served) == []


async def test_a_run_that_its_client_holds_up_is_told_of_as_such() -> None:
    """A client that takes nothing: its run is reported with 0 tokens for as long as it is not read from."""
    tokens = 50_000
    async with (
        running_engine(**DUMMY, max_seq_tokens=tokens + 100) as engine,
        serving([engine]) as served,
        grpc.aio.insecure_channel(served.sidecar.data_address, options=SMALL_WINDOW) as channel,
    ):
        ids = gateway_pb2.TokenIds(ids=[1, 2, 3])
        request = gateway_pb2.GenerateRequest(tokens=ids, max_tokens=tokens)
        call: Any = channel.unary_stream("/lorasidecar.v1.Gateway/Generate")(request.SerializeToString())
        await call.read()
        await until(lambda: [report for report in reports(served) if report == {1: 0}] != [])
        assert served.state.requests[1].progressing is False
        call.cancel()
