"""`POST /drain`: who stops the engine beside a sidecar learns when nothing runs on it any more."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from sidecar.config import parse
from sidecar.core.effects import Dispatch
from sidecar.core.events import FirstToken
from sidecar.errors import Misused
from sidecar.proto import gateway_pb2, gateway_pb2_grpc
from sidecar.serve.app import Sidecar
from tests.kit.emulated import running_engine
from tests.kit.serving import PATIENCE_S, Recorder, place_of, serving, until, write_adapters
from tests.kit.vllm_emulated import running_vllm

FREE = {"address": "127.0.0.1:0"}
LISTENERS = {"data": FREE, "admin": FREE, "http": FREE, "drain": FREE}


async def test_it_is_answered_when_all_has_ended(tmp_path: Path) -> None:
    """What runs is answered in full, what comes is refused, and asking again changes nothing."""
    write_adapters(tmp_path, 2)
    async with (
        running_engine(compute="none", shape="tiny", time_scale=1.0) as engine,
        serving([engine], tmp_path, listeners=LISTENERS) as served,
        httpx.AsyncClient(base_url=f"http://{served.sidecar.listening.drain}", timeout=PATIENCE_S) as http,
    ):
        assert (await http.get("/drain")).status_code == 405
        asks = [asyncio.create_task(served.ask(f"a{number % 2:02}", tokens=60)) for number in range(8)]
        await until(lambda: served.recorder.count(Dispatch) > 0)
        drains = [asyncio.create_task(http.post("/drain")) for _ in range(2)]
        await until(lambda: served.state.draining)
        assert not any(drain.done() for drain in drains)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await served.ask("a00")
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        answers = [await drain for drain in drains]
        assert all((answer.status_code, answer.text) == (200, "drained\n") for answer in answers)
        for number, ask in enumerate(asks):
            assert (await ask).tokens == served.expected(f"a{number % 2:02}", 60)
        assert (await http.post("/drain")).status_code == 200
        await served.sidecar.drain()


def test_only_this_machine_may_reach_it() -> None:
    with pytest.raises(Misused, match="reachable from other machines"):
        parse({"listeners": {"drain": {"address": "0.0.0.0:9004"}}}, "the test")


async def test_the_process_ends_once_it_has_said_so(tmp_path: Path) -> None:
    """An engine that is restarted alone must not come back to a sidecar that takes nothing."""
    write_adapters(tmp_path / "adapters", 1)
    async with running_engine(compute="none", shape="tiny") as engine:
        config = {
            "backends": [{"url": f"triton://{engine.grpc_address}", "id": "trt-0"}],
            "listeners": LISTENERS,
            "adapters": {"serve": str(tmp_path / "adapters")},
        }
        sidecar = await Sidecar.start(parse(config, "the test"))
        running = asyncio.create_task(sidecar.run_until_signalled())
        async with httpx.AsyncClient(base_url=f"http://{sidecar.listening.drain}", timeout=PATIENCE_S) as http:
            assert (await http.post("/drain")).text == "drained\n"
        async with asyncio.timeout(PATIENCE_S):
            await running


async def rest_of(call: Any) -> None:
    while await call.read():
        pass


@pytest.mark.parametrize("by", ["the drain's end", "a second signal"])
async def test_what_is_still_open_is_cut_off_in_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    """Clients of every protocol read that the sidecar is shutting down, and so does the log: none of them has left.

    What has got nothing may be sent again; of an answer that has begun the rest is lost.
    """
    caplog.set_level(logging.INFO, "sidecar")
    async with running_vllm(compute="none", time_scale=1.0) as (engine, _), httpx.AsyncClient(timeout=60) as http:
        shared = {"adapters_dir": str(tmp_path), "engine": {"seats": 3}}
        config = {
            "backends": [place_of(engine, 0) | shared],
            "listeners": LISTENERS,
            "drain_timeout_s": 0.1 if by == "the drain's end" else 600,
        }
        sidecar = await Sidecar.start(parse(config, "the test"))
        recorder = Recorder()
        sidecar.gateway.observe(recorder)
        ending = asyncio.create_task(sidecar.run_until_signalled())
        url = f"http://{sidecar.http_address}/v1/completions"

        def post(name: str, **more: Any) -> asyncio.Task[httpx.Response]:
            body = {"model": "base", "prompt": "hello", "max_tokens": 30_000} | more
            return asyncio.create_task(http.post(url, json=body, headers={"x-request-id": name}))

        asks = {"whole": post("whole"), "streamed": post("streamed", stream=True)}
        async with grpc.aio.insecure_channel(sidecar.data_address) as channel:
            prompt = gateway_pb2.TokenIds(ids=[1, 2])
            call = gateway_pb2_grpc.GatewayStub(channel).Generate(
                gateway_pb2.GenerateRequest(tokens=prompt, max_tokens=30_000)
            )
            assert (await call.read()).token_ids
            await until(lambda: sum(isinstance(event, FirstToken) for event in recorder.events) == 2)
            await until(lambda: recorder.count(Dispatch) == 3)
            asks["waiting"] = post("waiting")
            await until(lambda: sidecar.gateway.state.queued == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: sidecar.gateway.state.draining)
            if by == "a second signal":
                os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(grpc.aio.AioRpcError) as lost:
                async with asyncio.timeout(PATIENCE_S):
                    await rest_of(call)
        answers = {name: await answer for name, answer in asks.items()}
        await ending
    assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "the sidecar is shutting down" in str(lost.value.details())
    assert "grpc-status-details-bin" in dict(lost.value.trailing_metadata() or ())  # else it reads as unreachable
    for name in ("whole", "waiting"):
        error = answers[name].json()["error"]
        assert (answers[name].status_code, answers[name].headers["x-request-id"]) == (503, name)
        assert (error["reason"], error["message"].startswith("the sidecar is shutting down")) == ("draining", True)
    last = answers["streamed"].text.strip().rsplit("\n\n", 1)[-1]
    assert "the sidecar is shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
    ended = [record for record in caplog.records if record.name == "sidecar.requests"]
    assert len(ended) == 4
    assert all(
        record.levelname == "WARNING" and "the sidecar is shutting down" in record.getMessage() for record in ended
    )
