"""`sidecar serve` as a process: ready line, SIGTERM, what a restart keeps, and its journal."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from sidecar.cli.exits import Exit
from sidecar.lab.engine.tokens import BOS
from sidecar.proto import admin_pb2, admin_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.serving import until

FREE = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--http", "127.0.0.1:0")


@dataclass
class Served:
    process: asyncio.subprocess.Process
    data: str
    admin: str

    async def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()


@asynccontextmanager
async def sidecar(*arguments: str, log: Path = Path(os.devnull)) -> AsyncIterator[Served]:
    with log.open("w") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sidecar", "serve", "--json", *FREE, *arguments,
            stdout=asyncio.subprocess.PIPE, stderr=stderr,
        )  # fmt: skip
    try:
        assert process.stdout is not None
        ready = json.loads(await process.stdout.readline())
        yield Served(process, ready["data"], ready["admin"])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


async def ask(address: str, adapter: str, tokens: int, started: asyncio.Event | None = None) -> list[int]:
    """Ask once the backend is up: until then the sidecar holds the request back."""
    got: list[int] = []
    async with grpc.aio.insecure_channel(address) as channel:
        ids = gateway_pb2.TokenIds(ids=[BOS, 1, 2])
        request = gateway_pb2.GenerateRequest(adapter=adapter, tokens=ids, max_tokens=tokens)
        async for message in gateway_pb2_grpc.GatewayStub(channel).Generate(request):
            got += message.token_ids
            if started is not None:
                started.set()
    return got


async def test_sigterm_finishes_what_is_in_flight_and_exits_0(tmp_path: Path) -> None:
    """A running answer comes in full, a new request is refused, an idle stream and a watching operator delay nothing.

    The exit code is 0, and the log has no error. It names an engine once, and ends with "stopped".
    """
    log = tmp_path / "log"
    write_adapter(tmp_path / "loras" / "sql")
    async with running_engine(compute="none", time_scale=0.2) as engine:
        backend = ("--backend", f"triton://{engine.grpc_address}", "--adapters", str(tmp_path / "loras"))
        async with (
            sidecar(*backend, log=log) as served,
            grpc.aio.insecure_channel(served.data) as channel,
            grpc.aio.insecure_channel(served.admin) as admin,
        ):
            watching = admin_pb2_grpc.AdaptersStub(admin).Watch(admin_pb2.WatchRequest())
            assert (await watching.read()).name == "sql"
            idle: Any = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
            await idle.wait_for_connection()
            started = asyncio.Event()
            running = asyncio.create_task(ask(served.data, "sql", 80, started))
            await started.wait()
            ended = asyncio.create_task(served.terminate())
            assert len(await running) == 80
            assert await ended == 0
            with pytest.raises(grpc.aio.AioRpcError):
                await ask(served.data, "sql", 1)
    lines = log.read_text().splitlines()
    assert any("WARNING" in line and "draining" in line for line in lines)
    assert not [line for line in lines if " ERROR " in line or "Traceback" in line]
    (up,) = [line for line in lines if " is up: " in line]
    assert up.count(engine.grpc_address) == 1
    assert lines[-1].endswith("stopped")


async def test_a_restart_keeps_names_pins_and_allow_lists_and_the_journal_replays(tmp_path: Path) -> None:
    """The data directory holds what operators said; every step of both lives replays to the same effects."""
    path = write_adapter(tmp_path / "loras" / "sql")
    data = ("--data-directory", str(tmp_path / "data"), "--set", f"adapters.roots=[{tmp_path}]")
    async with running_engine(compute="none") as engine:
        backend = ("--backend", f"triton://{engine.grpc_address}", *data)
        async with sidecar(*backend) as served, grpc.aio.insecure_channel(served.admin) as channel:
            adapters = admin_pb2_grpc.AdaptersStub(channel)
            await adapters.Register(admin_pb2.RegisterRequest(name="sql", path=str(path), allow=["", "a"], pin=True))
            assert len(await ask(served.data, "sql", 5)) == 5
            assert await served.terminate() == 0
        async with sidecar(*backend) as served, grpc.aio.insecure_channel(served.admin) as channel:
            adapters = admin_pb2_grpc.AdaptersStub(channel)
            held = await adapters.Get(admin_pb2.AdapterRequest(name="sql"))
            assert (held.pinned, list(held.allow)) == (True, ["", "a"])
            assert len(await ask(served.data, "sql", 5)) == 5
            assert await served.terminate() == 0
    replay = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "replay", str(tmp_path / "data" / "journal"), "--json",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, error = await replay.communicate()
    assert replay.returncode == 0, (out + error).decode()


async def test_a_killed_sidecar_leaves_no_loader_behind(tmp_path: Path) -> None:
    """kill -9: the loader process sees its pipe close and ends."""
    psutil = pytest.importorskip("psutil")
    write_adapter(tmp_path / "loras" / "sql")
    async with running_engine(compute="none") as engine:
        backend = ("--backend", f"triton://{engine.grpc_address}", "--adapters", str(tmp_path / "loras"))
        async with sidecar(*backend) as served:
            await ask(served.data, "sql", 2)
            (loader,) = psutil.Process(served.process.pid).children()
            served.process.kill()
            await served.process.wait()
            await until(lambda: not loader.is_running() or loader.status() == psutil.STATUS_ZOMBIE)


async def test_sighup_reads_the_file_again_with_the_options_of_the_start(tmp_path: Path) -> None:
    """The process goes on; what is wrong in the file, or overridden by an option, changes nothing."""
    file = tmp_path / "sidecar.yaml"
    file.write_text("queue: {queued_max: 10}")
    options = ("--config", str(file), "--set", "queue.joining_s_max=7")
    async with sidecar(*options) as served, grpc.aio.insecure_channel(served.admin) as channel:
        configuration: Any = admin_pb2_grpc.ConfigurationStub(channel)

        async def queue() -> Any:
            return json.loads((await configuration.Get(admin_pb2.GetConfigurationRequest())).json)["queue"]

        assert ((await queue())["queued_max"], (await queue())["joining_s_max"]) == (10, 7)
        for text, expected in (
            ("queue: {queued_max: 20, joining_s_max: 1}", 20),
            ("queue: {queued_max: none}", 20),
            ("queue: {queued_max: 30}", 30),
        ):
            file.write_text(text)
            served.process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(60):
                while expected != (await queue())["queued_max"]:
                    await asyncio.sleep(0.01)
        assert (await queue())["joining_s_max"] == 7
        assert await served.terminate() == 0


async def test_without_a_file_sighup_ends_the_process() -> None:
    """As a closed terminal does; there is nothing to read again. Under nohup, which children inherit, it would not."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    async with sidecar() as served:
        signal.signal(signal.SIGHUP, before)
        served.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(60):
            assert await served.process.wait() == -signal.SIGHUP


ENDS_SOON = """
from sidecar.serve import app
app.STOP_S = 1.0
from sidecar.cli import main
main()
"""


@pytest.mark.parametrize(
    ("hangs", "said"),
    [
        ("task", r"not ended: task \S+ in endless_dialect\.py:\d+ EndlessBackend\.stop > \S+ sleep"),
        ("loop", r"not ended: thread MainThread in .* stop"),
        ("thread", r"not ended: thread endless in .* sleep_a_day"),
    ],
)
async def test_a_stop_that_does_not_end_is_ended(tmp_path: Path, hangs: str, said: str) -> None:
    """A task that takes no cancellation, a call that holds the event loop, a thread for which the interpreter waits."""
    file = tmp_path / "sidecar.yaml"
    backend = f"{{kind: 'tests.kit.endless_dialect:DIALECT', url: 'endless://127.0.0.1:9', hangs: {hangs}}}"
    file.write_text(f"backends: [{backend}]")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ENDS_SOON, "serve", "--json", *FREE, "--config", str(file),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        await process.stdout.readline()
        process.terminate()
        async with asyncio.timeout(60):
            _, log = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == Exit.FAILED
    assert "the sidecar was to end and goes on, so it exits with code 1" in log.decode()
    assert re.search(said, log.decode()), log.decode()
