"""`POST /drain`: who stops the engine beside a sidecar learns when nothing runs on it any more."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import httpx
import pytest

from sidecar.config import parse
from sidecar.core.effects import Dispatch
from sidecar.errors import Misused
from sidecar.serve.app import Sidecar
from tests.kit.emulated import running_engine
from tests.kit.serving import PATIENCE_S, serving, until, write_adapters

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
