"""One bad adapter must not walk through a pool: real processes that really die of it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from sidecar.core.effects import Quarantine
from sidecar.core.enums import Phase
from sidecar.proto import admin_pb2
from tests.kit.emulated import EngineProcess
from tests.kit.faults import assert_broken_off, assert_nothing_left, assert_right, attempt, gathered
from tests.kit.serving import serving, until, write_adapters

BACKENDS = 8


@pytest.mark.slow
async def test_an_adapter_that_crashes_every_engine(tmp_path: Path) -> None:
    """Eight backends under load: at most two are lost, no other adapter's tokenless request fails, it is quarantined.

    `adapters list` shows it, a release lifts it, and what was lost serves again when it is back.
    """
    names = write_adapters(tmp_path, 9)
    (tmp_path / names.pop()).rename(tmp_path / "bad")
    engines = [EngineProcess("--compute", "none", "--crash-on-load", "bad", time_scale=0.2) for _ in range(BACKENDS)]
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(engine) for engine in engines))
        served = await stack.enter_async_context(serving(engines, tmp_path))
        for tried in await gathered(*(attempt(served, name) for name in names)):
            assert_right(served, tried)
        asks = [
            asyncio.create_task(attempt(served, "bad" if n % 8 == 5 else names[n % 8], 40, stream=n % 3 > 0))
            for n in range(160)
        ]
        tried = await gathered(*asks)
        for one in tried:
            if one.name == "bad":
                assert "bad is quarantined: its first loads coincided with the loss of trt-" in one.words
            elif one.error is None:
                assert_right(served, one, 40)
            else:
                assert_broken_off(served, one)
        down = [backend.id for backend in served.state.backends.values() if backend.phase is Phase.DOWN]
        assert len(down) == 2
        assert [note.digest for note in served.recorder.of(Quarantine)] == [served.state.names["bad"].digest]
        listed = {a.name: a.quarantined for a in (await served.adapters.List(admin_pb2.ListAdaptersRequest())).adapters}
        assert {name for name, reason in listed.items() if reason} == {"bad"}
        assert all(backend in listed["bad"] for backend in down)
        await assert_nothing_left(served)

        released = await served.adapters.Release(admin_pb2.AdapterRequest(name="bad"))
        assert not released.quarantined
        for number in (int(backend.removeprefix("trt-")) for backend in down):
            await engines[number].wait()
            await engines[number].start()
        await until(lambda: all(backend.takes_requests for backend in served.state.backends.values()))
        for tried_again in await gathered(*(attempt(served, name) for name in names * 4)):
            assert_right(served, tried_again)
        await assert_nothing_left(served)


async def test_release_of_an_adapter_that_has_become_harmless(tmp_path: Path) -> None:
    """After a release it is loaded again; engines that no longer die of it serve it."""
    write_adapters(tmp_path, 1)
    deadly = [EngineProcess("--compute", "none", "--crash-on-load", "a00") for _ in range(2)]
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(engine) for engine in deadly))
        served = await stack.enter_async_context(serving(deadly, tmp_path))
        refused = await attempt(served, "a00")
        assert refused.error is not None
        assert refused.error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "ask your operator to release it" in refused.words
        for engine in deadly:
            await engine.wait()
            port = int(engine.grpc_address.rsplit(":", 1)[1])
            await stack.enter_async_context(EngineProcess("--compute", "none", grpc_port=port))
        await until(lambda: all(backend.takes_requests for backend in served.state.backends.values()))
        with pytest.raises(grpc.aio.AioRpcError):
            await served.ask("a00")
        await served.adapters.Release(admin_pb2.AdapterRequest(name="a00"))
        assert_right(served, await attempt(served, "a00"))
        await assert_nothing_left(served)
