"""Backends that die, restart and hang: nothing is doubled, nothing is lost in silence, and service comes back."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2_grpc

from sidecar.backends import endpoint
from sidecar.backends.triton.backend import TritonBackend
from sidecar.backends.triton.probe import PROBE_ID
from sidecar.core.enums import Phase
from sidecar.core.events import BackendLost, BackendUp
from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from tests.kit.emulated import EngineProcess, core_request, running_engine
from tests.kit.faults import (
    DUMMY,
    ENDLESS,
    assert_broken_off,
    assert_nothing_left,
    assert_right,
    attempt,
    gathered,
    heals,
)
from tests.kit.serving import Serving, serving, until, write_adapters

SLOW = ("--compute", "none", "--max-seq-tokens", "1000000", "--kv-blocks", "1000000")


def running(served: Serving, backend: str = "trt-0") -> int:
    return len(served.state.backends[backend].running)


def events(served: Serving, kind: type) -> list[Any]:
    return [event for event in served.recorder.events if isinstance(event, kind)]


async def test_lost_before_the_first_token_with_one_backend(tmp_path: Path) -> None:
    """The request waits for the engine to come back, is loaded and sent again, and is right."""
    write_adapters(tmp_path, 1)
    async with EngineProcess(*SLOW, time_scale=0.2) as engine, serving([engine], tmp_path) as served:
        asking = asyncio.create_task(attempt(served, "a00", 400, stream=False))
        await until(lambda: running(served) == 1)
        await engine.kill()
        await until(lambda: served.state.backends["trt-0"].phase is Phase.DOWN)
        await engine.start()
        tried = await asking
        assert_right(served, tried, 400)
        assert tried.origins[0].heals == 1
        await assert_nothing_left(served)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """The errors of looking for an engine that is away: it is often, and each has another text."""
    made: list[Exception] = []

    def text(error: Exception) -> str:
        made.append(error)
        return f"attempt {len(made)}"

    monkeypatch.setattr(TritonBackend, "_error_text", staticmethod(text))
    monkeypatch.setattr(endpoint, "REACH_S", 0.01)
    return made


async def test_an_outage_is_two_lines_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, attempts: list[Exception]
) -> None:
    """Lost and up again, however often the engine is looked for meanwhile and whatever the error says each time."""
    caplog.set_level(logging.INFO)
    async with EngineProcess(*SLOW) as engine, serving([engine], tmp_path) as served:
        caplog.clear()
        await engine.kill()
        await until(lambda: len(attempts) > 5)
        await engine.start()
        await until(lambda: served.state.backends["trt-0"].phase is Phase.UP)
        said = [record.getMessage() for record in caplog.records if "trt-0" in record.getMessage()]
        assert [line.partition(": ")[0] for line in said] == ["backend trt-0 is lost", "trt-0 is up"]


@pytest.mark.parametrize("patience_s", [60.0, 0.0])
async def test_an_engine_that_starts_beside_us_is_awaited_before_it_is_a_warning(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    attempts: list[Exception],
    patience_s: float,
) -> None:
    """However often it is looked for, it is told once that it is not up yet; that is a warning only after a while."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(endpoint, "NOT_YET_S", patience_s)
    engine = EngineProcess(*SLOW)
    async with engine:
        await engine.kill()
        async with serving([engine], tmp_path, until_up=False) as served:
            await until(lambda: len(attempts) > 5)
            await engine.start()
            await until(lambda: served.state.backends["trt-0"].phase is Phase.UP)
    said = [(record.levelname, record.getMessage().partition(": ")[0]) for record in caplog.records]
    first = ("INFO", "trt-0 is not up yet") if patience_s else ("WARNING", "trt-0 is down")
    assert [line for line in said if "trt-0 is" in line[1]] == [first, ("INFO", "trt-0 is up")]


async def test_lost_after_the_first_token(tmp_path: Path) -> None:
    """The answer breaks off with an error that says so; it is not repeated, and the next request is served."""
    write_adapters(tmp_path, 1)
    async with EngineProcess(*SLOW, time_scale=0.2) as engine, serving([engine], tmp_path) as served:
        asking = asyncio.create_task(attempt(served, "a00", 100_000))
        await until(lambda: any(request.first_token for request in served.state.requests.values()))
        await engine.kill()
        tried = await asking
        assert_broken_off(served, tried)
        assert "trt-0" in tried.words
        await engine.start()
        assert_right(served, await attempt(served, "a00"))
        await assert_nothing_left(served)


async def test_lost_before_the_first_token_with_two_backends(tmp_path: Path) -> None:
    """The other backend answers it; when that is lost too the request ends and names both."""
    write_adapters(tmp_path, 1)
    async with (
        EngineProcess(*SLOW, time_scale=0.2) as one,
        EngineProcess(*SLOW, time_scale=0.2) as two,
        serving([one, two], tmp_path) as served,
    ):
        asks = [asyncio.create_task(attempt(served, "a00", tokens, stream=False)) for tokens in (300, 100_000)]
        await until(lambda: running(served) + running(served, "trt-1") == 2)
        first, second = ("trt-0", "trt-1") if running(served) else ("trt-1", "trt-0")
        engines = {"trt-0": one, "trt-1": two}
        await engines[first].kill()
        await until(lambda: running(served, second) == 2)
        short = await asks[0]
        assert_right(served, short, 300)
        assert short.origins[0].backend == second
        await engines[second].kill()
        long = await asks[1]
        assert f"lost {first} and then {second} before the first token" in long.words
        assert "at most 2 backends" in long.words
        await assert_nothing_left(served)


async def test_restarted_cold_under_load(tmp_path: Path) -> None:
    """kill -9 and a start on the same port under 120 requests: those with a token end clearly, the others are right.

    Afterwards the gateway serves without help, and nothing is left behind.
    """
    names = write_adapters(tmp_path, 6)
    async with (
        EngineProcess(*SLOW, "--seats", "32", "--lora-host-pages", "4", time_scale=0.2) as engine,
        serving([engine], tmp_path) as served,
    ):
        asks = [
            asyncio.create_task(attempt(served, names[n % 6], 60, stream=bool(n % 4))) for n in range(120)
        ]  # fmt: skip
        await until(lambda: sum(request.first_token for request in served.state.requests.values()) >= 5)
        await engine.kill()
        await until(lambda: served.state.backends["trt-0"].phase is Phase.DOWN)
        await engine.start()
        tried = await gathered(*asks)
        broken = [one for one in tried if one.error is not None]
        for one in broken:
            assert_broken_off(served, one)
        for one in tried:
            if one.error is None:
                assert_right(served, one, 60)
        assert 1 <= len(broken) <= 35, "no more than had a seat"
        assert len(events(served, BackendLost)) == 1
        for again in await gathered(*(attempt(served, name) for name in names)):
            assert_right(served, again)
        await assert_nothing_left(served)


@pytest.mark.slow
async def test_restarts_again_and_again(tmp_path: Path) -> None:
    """An engine that is killed while loads are under way costs loads, never an answer without a token."""
    names = write_adapters(tmp_path, 4)
    async with EngineProcess(*SLOW, time_scale=0.2) as engine, serving([engine], tmp_path) as served:
        for name in names:
            assert_right(served, await attempt(served, name))
        for _ in range(3):
            asks = [asyncio.create_task(attempt(served, names[n % 4], 5)) for n in range(12)]
            await until(lambda: bool(served.state.loads) or running(served) > 0)
            await engine.kill()
            await until(lambda: served.state.backends["trt-0"].phase is Phase.DOWN)
            await engine.start()
            for tried in await gathered(*asks):
                if tried.error is None:
                    assert_right(served, tried, 5)
                else:
                    assert_broken_off(served, tried)
        assert not [name for name, version in served.state.versions.items() if version.quarantined]
        await assert_nothing_left(served)


async def test_an_engine_that_hangs_while_its_server_stays_live(tmp_path: Path) -> None:
    """Requests with a token end, the others wait; the engine is trusted again when it has answered, not before."""
    write_adapters(tmp_path, 1)
    facts = {"progress_timeout_s": 1.0}
    async with running_engine(**DUMMY, **ENDLESS, freeze_after=30, metrics_port=0) as frozen:
        port, metrics_port = (int(a.rsplit(":", 1)[1]) for a in (frozen.grpc_address, str(frozen.metrics_address)))
        async with serving([frozen], tmp_path, backend=facts) as served:
            begun = asyncio.create_task(attempt(served, "a00", 100_000))
            tokenless = asyncio.create_task(attempt(served, "a00", 100, stream=False))
            assert_broken_off(served, await begun)
            (lost,) = events(served, BackendLost)
            assert "answered nothing for" in lost.cause
            detail = served.sidecar.gateway.backends["trt-0"].detail
            await until(lambda: "DEADLINE_EXCEEDED" in detail())  # it is live and ready, and answers no token
            assert len(events(served, BackendUp)) == 1
            assert not tokenless.done()
            await frozen.stop()
            async with running_engine(**DUMMY, **ENDLESS, grpc_port=port, metrics_port=metrics_port) as healthy:
                assert_right(served, await tokenless, 100)
                assert healthy.served[0].request_id == PROBE_ID
                assert_right(served, await attempt(served, "a00"))
                await assert_nothing_left(served)


async def test_a_hanging_backend_gives_its_requests_to_another(tmp_path: Path) -> None:
    """A tokenless request on the engine that hangs is answered by the other, once."""
    write_adapters(tmp_path, 2)
    facts = {"progress_timeout_s": 1.0}
    async with (
        running_engine(**DUMMY, **ENDLESS, freeze_after=20, metrics_port=0) as frozen,
        running_engine(**DUMMY, **ENDLESS, metrics_port=0) as healthy,
        serving([frozen, healthy], tmp_path, backend=facts) as served,
    ):
        asks = [asyncio.create_task(attempt(served, f"a0{n % 2}", 60, stream=False)) for n in range(6)]
        for tried in await gathered(*asks):
            assert_right(served, tried, 60)
            assert tried.origins[0].backend == "trt-1"
        assert [lost.backend for lost in events(served, BackendLost)] == ["trt-0"]
        await assert_nothing_left(served)


async def test_a_healthy_engine_with_a_long_unary_request_is_never_called_stuck(tmp_path: Path) -> None:
    """No response comes for several times the timeout, but the iteration counter moves."""
    write_adapters(tmp_path, 1)
    facts = {"progress_timeout_s": 1.0}
    slow = {"time_scale": 1.0, "metrics_port": 0, "decoupled": False}
    async with running_engine(**DUMMY | slow) as engine, serving([engine], tmp_path, backend=facts) as served:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
        begun_s = monotonic()
        answer = await stub.ModelInfer(core_request(tokens=400, lora_name="a00"))
        took_s = monotonic() - begun_s
        names = [output.name for output in answer.outputs]
        ids = np.frombuffer(answer.raw_output_contents[names.index("output_ids")], np.int32).tolist()
        assert ids == served.expected("a00", 400)
        assert took_s > 2 * facts["progress_timeout_s"], "the test must be longer than the timeout to mean anything"
        assert not events(served, BackendLost)
        await assert_nothing_left(served)


async def test_a_client_that_takes_nothing_does_not_make_its_engine_look_stuck(tmp_path: Path) -> None:
    """The engine is silent because nobody reads from it: that is the client's doing."""
    write_adapters(tmp_path, 1)
    facts = {"progress_timeout_s": 0.3}
    async with (
        running_engine(**DUMMY, max_seq_tokens=20_000) as engine,
        serving([engine], tmp_path, backend=facts) as served,
    ):
        small_window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096))
        async with grpc.aio.insecure_channel(served.sidecar.data_address, options=small_window) as channel:
            ids = gateway_pb2.TokenIds(ids=[1, 2, 3])
            stalled = gateway_pb2_grpc.GatewayStub(channel).Generate(
                gateway_pb2.GenerateRequest(adapter="a00", tokens=ids, max_tokens=15_000)
            )
            await stalled.read()
            endpoint: Any = served.sidecar.gateway.backends["trt-0"]
            await until(lambda: any(run.waits_for_client for run in endpoint._runs.values()))
            await until(lambda: endpoint._server.pulse.is_still(monotonic()))
            await endpoint._look()
            assert not events(served, BackendLost)
            assert_right(served, await attempt(served, "a00"))
            stalled.cancel()
        await assert_nothing_left(served)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:1/metrics", "; http://127.0.0.1:1/metrics has no metrics"),
        (None, "; no metrics: backends[].metrics names their URL where gRPC is not at port 8001"),
    ],
)
async def test_unreachable_metrics_are_no_reason_to_call_an_engine_lost(
    tmp_path: Path, url: str | None, said: str
) -> None:
    """It serves with what is known, and `backends show` says what is not."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path, backend={"metrics": url}) as served:
        assert_right(served, await attempt(served, "a00"))
        detail = served.sidecar.gateway.backends["trt-0"].detail()
        assert said in detail
        assert "not known, so not checked: base model, max rank, modules, " in detail
        assert heals(served) == []
        assert not events(served, BackendLost)
