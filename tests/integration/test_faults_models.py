"""Models that are unloaded, changed, or whose process has died, while their server stays: what runs may end first."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2

from sidecar.core.enums import Phase
from sidecar.core.events import BackendLost
from sidecar.lab.engine.kserve.answers import Answering
from sidecar.lab.engine.kserve.control import Control
from sidecar.lab.engine.kserve.errors import Rejection
from sidecar.lab.engine.kserve.inference import Answer
from sidecar.proto import gateway_pb2
from tests.kit.emulated import clients_asked, running_engine
from tests.kit.faults import DUMMY, ENDLESS, assert_nothing_left, assert_right, attempt
from tests.kit.serving import Serving, serving, until, write_adapters

NO_MODEL = "Request for unknown model: 'tensorrt_llm' has no available versions"
DEAD = "Stub process 'tensorrt_llm_0_0' is not healthy."


def lost(served: Serving) -> list[str]:
    return [event.cause for event in served.recorder.events if isinstance(event, BackendLost)]


def is_up(served: Serving, backend: str = "trt-0") -> bool:
    return served.state.backends[backend].phase is Phase.UP


class Unloaded:
    """Has every emulated server of this process say of its models what Triton says of one that is unloaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.away = False
        answer, ready = Answering.answer, Control.ModelReady

        async def answered(answering: Any, request: Any, emit: Any) -> None:
            if self.away:
                raise Rejection(NO_MODEL, grpc.StatusCode.NOT_FOUND)
            await answer(answering, request, emit)

        async def is_ready(control: Any, request: Any, context: Any) -> Any:
            return service_pb2.ModelReadyResponse() if self.away else await ready(control, request, context)

        monkeypatch.setattr(Answering, "answer", answered)
        monkeypatch.setattr(Control, "ModelReady", is_ready)


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "whole"])
async def test_what_runs_ends_and_what_comes_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoupled: bool
) -> None:
    """The model is unloaded while an answer is under way: it comes whole, the others when there is a model again."""
    write_adapters(tmp_path, 1)
    unloaded = Unloaded(monkeypatch)
    options = DUMMY | ENDLESS | {"decoupled": decoupled}
    async with running_engine(**options) as engine, serving([engine], tmp_path) as served:
        assert_right(served, await attempt(served, "a00"))
        running = asyncio.create_task(attempt(served, "a00", 700))
        await until(lambda: engine.engine.counters.active == 1 and len(clients_asked(engine)) == 2)
        unloaded.away = True
        waiting = [asyncio.create_task(attempt(served, "a00")) for _ in range(5)]
        detail = served.sidecar.gateway.backends["trt-0"].detail
        await until(lambda: "not ready; 1 still run" in detail())
        assert is_up(served)
        assert_right(served, await running, 700)
        await until(lambda: not is_up(served))
        assert "not ready" in detail()
        assert not any(ask.done() for ask in waiting)
        unloaded.away = False
        for tried in await asyncio.gather(*waiting):
            assert_right(served, tried)
        assert len(lost(served)) == 1
        await assert_nothing_left(served)


async def test_a_model_that_changes_takes_nothing_new_until_what_runs_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton puts another model in the place of one that still answers."""
    write_adapters(tmp_path, 1)
    changed = False
    config = Control.ModelConfig

    async def other(control: Any, request: Any, context: Any) -> Any:
        reply = await config(control, request, context)
        if changed:
            reply.config.parameters["lora_cache_host_memory_bytes"].string_value = str(7 << 20)
        return reply

    monkeypatch.setattr(Control, "ModelConfig", other)
    async with running_engine(**DUMMY, **ENDLESS) as engine, serving([engine], tmp_path) as served:
        running = asyncio.create_task(attempt(served, "a00", 1000))
        await until(lambda: any(request.first_token for request in served.state.requests.values()))
        changed = True
        detail = served.sidecar.gateway.backends["trt-0"].detail
        await until(lambda: "its model's configuration has changed; 1 still run" in detail())
        waiting = asyncio.create_task(attempt(served, "a00"))
        assert_right(served, await running, 1000)
        assert_right(served, await waiting)
        assert served.state.backends["trt-0"].facts.host_bytes == 7 << 20
        await assert_nothing_left(served)


@pytest.mark.parametrize("metrics_port", [None, 0], ids=["no metrics", "metrics"])
async def test_a_model_whose_process_has_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metrics_port: int | None
) -> None:
    """Its server stays ready and says so of every request: nobody is told, and all are answered when it is mended."""
    write_adapters(tmp_path, 2)
    dead = False
    answer = Answering.answer

    async def answered(answering: Any, request: Any, emit: Any) -> None:
        await (emit(Answer(None, DEAD, final=True)) if dead else answer(answering, request, emit))

    monkeypatch.setattr(Answering, "answer", answered)
    async with (
        running_engine(**DUMMY, metrics_port=metrics_port) as engine,
        serving([engine], tmp_path) as served,
    ):
        assert_right(served, await attempt(served, "a00"))
        dead = True
        asks = [asyncio.create_task(attempt(served, name)) for name in ("a00", "a01", "")]
        detail = served.sidecar.gateway.backends["trt-0"].detail
        await until(lambda: not is_up(served))
        await until(lambda: "does not answer a token yet" in detail())
        assert DEAD in detail()
        assert lost(served) == [DEAD]
        assert not any(ask.done() for ask in asks)
        dead = False
        for tried in await asyncio.gather(*asks):
            assert_right(served, tried)
        await assert_nothing_left(served)


async def test_a_step_that_has_died_is_not_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine still answers: its backend stays, and whoever asked for that step is told in the server's words."""
    write_adapters(tmp_path, 1)
    text = "in ensemble 'ensemble', Stub process 'preprocessing_0_0' is not healthy."
    answer = Answering.answer

    async def answered(answering: Any, request: Any, emit: Any) -> None:
        dead = request.model_name == "ensemble"
        await (emit(Answer(None, text, final=True)) if dead else answer(answering, request, emit))

    monkeypatch.setattr(Answering, "answer", answered)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path) as served:
        request = gateway_pb2.GenerateRequest(adapter="a00", text="hello", max_tokens=4)
        with pytest.raises(grpc.aio.AioRpcError, match="preprocessing_0_0' is not healthy"):
            async for _ in served.gateway.Generate(request):
                pass
        assert lost(served) == []
        assert_right(served, await attempt(served, "a00"))
        await assert_nothing_left(served)
