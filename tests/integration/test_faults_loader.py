"""The loader process dies, is slow, is stopped: loads are tried again, and nothing of it outlives the sidecar."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidecar.backends.triton import loads
from sidecar.backends.triton.loader import Loader
from sidecar.core.effects import Load
from tests.kit.emulated import running_engine, start_engine
from tests.kit.faults import DUMMY, ENDLESS, assert_nothing_left, assert_right, attempt, heals, occupied
from tests.kit.ports import free_port
from tests.kit.redis_servers import Proxy, pump
from tests.kit.serving import Serving, serving, until, write_adapters


def loader_of(served: Serving) -> int:
    """Return the loader's process id; there must be one."""
    pid = served.sidecar._loader.pid
    assert pid is not None
    return pid


async def test_a_loader_that_is_killed_mid_load(tmp_path: Path) -> None:
    """The load that it had under way is given to a new one; no client sees it, and no adapter is blamed."""
    write_adapters(tmp_path, 2)
    async with running_engine(**DUMMY, **ENDLESS, seats=1) as engine, serving([engine], tmp_path) as served:
        assert_right(served, await attempt(served, "a00"))
        first = loader_of(served)
        async with occupied(engine):
            asking = asyncio.create_task(attempt(served, "a01"))
            await until(lambda: engine.engine.counters.waiting == 1)
            os.kill(first, signal.SIGKILL)
            await until(lambda: served.sidecar._loader.pid not in (None, first))
            assert not asking.done()
        assert_right(served, await asking)
        assert heals(served) == []
        assert served.recorder.count(Load) == 2
        await assert_nothing_left(served)


class Holding(Proxy):
    """A proxy that can hold connections: they stay open, and nothing passes any more."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self._relays: dict[int, asyncio.Future[Any]] = {}

    def hold(self, pid: int) -> None:
        """Hold those of a process."""
        for connection in psutil.Process(pid).net_connections():
            if connection.laddr.port in self._relays:
                self._relays[connection.laddr.port].cancel()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, back}
        relay = self._relays[writer.get_extra_info("peername")[1]] = asyncio.gather(
            pump(reader, back), pump(there, writer)
        )
        await asyncio.gather(relay, return_exceptions=True)


async def test_an_engine_that_comes_back_is_loaded_over_a_new_connection(tmp_path: Path) -> None:
    """The loader's connection is that of the engine before, of whose end nothing tells it."""
    write_adapters(tmp_path, 2)
    port = free_port()
    engine = await start_engine(**DUMMY, grpc_port=port)
    proxy = Holding(port)
    await proxy.mend()
    backend = {"url": f"triton://127.0.0.1:{proxy.port}", "id": "trt-0"}
    try:
        async with serving([], tmp_path, backends=[backend]) as served:
            assert_right(served, await attempt(served, "a00"))
            proxy.hold(loader_of(served))
            await engine.stop()
            await until(lambda: not served.state.backends["trt-0"].takes_requests)
            engine = await start_engine(**DUMMY, grpc_port=port)
            await until(lambda: served.state.backends["trt-0"].takes_requests)
            assert_right(served, await attempt(served, "a01"))
            assert heals(served) == ["backend_lost"]
            assert served.recorder.count(Load) == 2
    finally:
        await proxy.cut()
        await engine.stop()


def test_a_newer_connection_of_one_backend_leaves_that_of_another_at_its_server() -> None:
    """Closing the channel of the other would cancel its loads."""
    loader, order = Loader(), {"address": "127.0.0.1:1", "decoupled": True}
    other = loader._channel(order | {"model": "b", "connection": 2})
    first = loader._channel(order | {"model": "a", "connection": 1})
    assert loader._channel(order | {"model": "a", "connection": 1}) is first
    newer = loader._channel(order | {"model": "a", "connection": 3})
    assert newer is not first
    assert loader._channel(order | {"model": "a", "connection": 1}) is newer  # a late order of before
    assert loader._channel(order | {"model": "b", "connection": 2}) is other
    for channel in (other, newer):
        channel.close()


async def test_a_signal_to_the_whole_group(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SIGTERM to all processes, as from systemd, is for the sidecar, which drains: loads go on meanwhile."""
    write_adapters(tmp_path, 2)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path) as served:
        assert_right(served, await attempt(served, "a00"))
        first = loader_of(served)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(first, number)
        assert_right(served, await attempt(served, "a01"))
        assert loader_of(served) == first
    assert "the loader process ended" not in caplog.text


async def test_loaders_that_are_killed_again_and_again(tmp_path: Path) -> None:
    """When two die under a load the core hears of it, and loads again a little later; still nobody is to blame."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY, **ENDLESS, seats=1) as engine, serving([engine], tmp_path) as served:
        async with occupied(engine):
            asking = asyncio.create_task(attempt(served, "a00"))
            for _ in range(2):
                await until(lambda: engine.engine.counters.waiting == 1)
                os.kill(loader_of(served), signal.SIGKILL)
                await until(lambda: engine.engine.counters.waiting == 0)
            await until(lambda: heals(served) == ["load_no_answer"])
        assert_right(served, await asking)
        version = served.state.versions[served.state.names["a00"].digest]
        assert not version.suspect
        assert not version.lost_backends
        await assert_nothing_left(served)


async def test_a_load_that_the_engine_does_not_get_to_in_time(tmp_path: Path) -> None:
    """Seats that others hold are nobody's fault: the load is tried again until they leave, and never quarantined."""
    write_adapters(tmp_path, 1)
    async with (
        running_engine(**DUMMY, **ENDLESS, seats=1) as engine,
        serving([engine], tmp_path, backend={"load_timeout_s": 0.2}) as served,
    ):
        async with occupied(engine):
            asking = asyncio.create_task(attempt(served, "a00"))
            await until(lambda: len(heals(served)) >= 3)
            assert set(heals(served)) == {"load_no_answer"}
        assert_right(served, await asking)
        assert not served.state.versions[served.state.names["a00"].digest].quarantined
        await assert_nothing_left(served)


async def test_the_loader_ends_with_the_sidecar(tmp_path: Path) -> None:
    """Stopped while a load is under way, the sidecar leaves no process and no blob behind."""
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY, **ENDLESS, seats=1) as engine, occupied(engine):
        async with serving([engine], tmp_path) as served:
            asking = asyncio.create_task(attempt(served, "a00"))
            await until(lambda: engine.engine.counters.waiting == 1)
            loader = loader_of(served)
        with pytest.raises(asyncio.CancelledError):  # its channel is closed
            await asking
        assert not psutil.pid_exists(loader)
        await until(lambda: engine.engine.counters.waiting == 0)


async def test_the_loader_ends_when_its_parent_is_gone_and_ignores_ctrl_c() -> None:
    """It leaves with status 0 when its input closes; SIGINT, which a terminal sends to all, is for the parent."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sidecar.backends.triton.loader",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    # An order that cannot be carried out is answered too, and shows that the process is up.
    process.stdin.write(b'{"load": 1}\n')
    assert b'"unanswered": true' in await process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.stdin.write(b'{"load": 2}\n')
    assert b'"load": 2' in await process.stdout.readline()
    process.stdin.close()
    assert await process.wait() == 0


async def test_a_loader_that_stands_still_does_not_keep_the_sidecar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loads, "END_S", 0.2)
    write_adapters(tmp_path, 1)
    async with running_engine(**DUMMY) as engine:
        async with serving([engine], tmp_path) as served:
            await until(lambda: served.sidecar._loader.pid is not None)
            loader = loader_of(served)
            os.kill(loader, signal.SIGSTOP)
        assert not psutil.pid_exists(loader)
