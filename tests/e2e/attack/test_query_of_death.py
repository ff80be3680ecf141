"""A client finds a request on which the core raises: nothing goes on from a state that may be half changed.

`raise_on` makes the core raise behind what it has changed, on requests for one adapter.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sidecar.core.events import Received
from sidecar.fronts.status import DETAILS
from sidecar.journal import replay
from sidecar.lab.engine.tokens import BOS
from sidecar.proto import admin_pb2, gateway_pb2, gateway_pb2_grpc
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.serving import serving, until

FREE = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--http", "127.0.0.1:0")
SLOW = {"compute": "none", "shape": "tiny", "time_scale": 1.0, "seats": 1}
CRASHED = 70
WAITS = re.compile(r'^lora_sidecar_queued_requests\{backend="[^"]+"\} 1\.0$', re.MULTILINE)
"""A request waits at the engine."""
DRAINS = re.compile("shutting down")


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    for seed, name in enumerate(("sql", "chef", "poison")):
        write_adapter(tmp_path / "adapters" / name, seed=seed)
    return tmp_path / "adapters"


@dataclass
class Process:
    """One `sidecar serve`."""

    process: asyncio.subprocess.Process
    errors: Path
    data: str = ""
    http: str = ""

    async def exit_code(self) -> int:
        async with asyncio.timeout(60):
            return await self.process.wait()


@asynccontextmanager
async def process(raise_on: str, *arguments: str, folder: Path) -> AsyncIterator[Process]:
    """Run a sidecar for a block; it has no addresses if it ended before it was ready."""
    errors = folder / "stderr"
    with errors.open("wb") as file:
        started = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sidecar", "serve", "--json", *FREE, *arguments,
            stdout=asyncio.subprocess.PIPE, stderr=file, env=os.environ | {"LORA_SIDECAR_RAISE_ON": raise_on},
        )  # fmt: skip
    running = Process(started, errors)
    try:
        assert started.stdout is not None
        line = await started.stdout.readline()
        if line:
            ready = json.loads(line)
            running.data, running.http = ready["data"], ready["http"]
        yield running
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()
        started._transport.close()  # type: ignore[attr-defined]


@dataclass
class Ask:
    """A client's request on a connection of its own, as it went."""

    tokens: list[int] = field(default_factory=list)
    code: grpc.StatusCode | None = None
    reason: str = ""
    details: str = ""
    retries: bool = False
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def go(self, address: str, adapter: str, tokens: int, request_id: str = "") -> Ask:
        async with grpc.aio.insecure_channel(address) as channel:
            request = gateway_pb2.GenerateRequest(
                adapter=adapter,
                tokens=gateway_pb2.TokenIds(ids=[BOS, 1, 2]),
                max_tokens=tokens,
                stream=True,
                request_id=request_id,
            )
            try:
                async for message in gateway_pb2_grpc.GatewayStub(channel).Generate(request, timeout=60):
                    self.tokens += message.token_ids
                    self.begun.set()
                self.code = grpc.StatusCode.OK
            except grpc.aio.AioRpcError as error:
                self._refused(error)
        return self

    def _refused(self, error: grpc.aio.AioRpcError) -> None:
        self.code, self.details = error.code(), error.details() or ""
        told = dict(error.trailing_metadata() or ())
        for packed in status_pb2.Status.FromString(told[DETAILS]).details if DETAILS in told else ():
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if packed.Unpack(info):
                self.reason = info.reason
            self.retries |= packed.Unpack(retry)


def replayed(path: Path) -> tuple[int, str]:
    """Return how `sidecar replay` ends, and what it says."""
    said: list[str] = []
    return replay.run(path, False, False, said.append, said.append), "\n".join(said)


async def test_a_request_on_which_the_core_raises_ends_the_process(adapters: Path, tmp_path: Path) -> None:
    """Its sender is not to send it again, who waits is, who has tokens is told; a restart serves; replay raises it."""
    data = tmp_path / "data"
    async with running_engine(**SLOW) as engine:
        arguments = (
            "--backend",
            f"triton://{engine.grpc_address}",
            "--adapters",
            str(adapters),
            "--data-directory",
            str(data),
        )
        async with process("Received:poison", *arguments, folder=tmp_path) as sidecar:
            begun, waits, poison = Ask(), Ask(), Ask()
            running = asyncio.create_task(begun.go(sidecar.data, "sql", 2000))
            await begun.begun.wait()
            waiting = asyncio.create_task(waits.go(sidecar.data, "chef", 4))
            await answers(sidecar.http, "/metrics", WAITS)
            await poison.go(sidecar.data, "poison", 4, "the-client's-own-id")
            await asyncio.gather(running, waiting)
            assert await sidecar.exit_code() == CRASHED
        await until(lambda: "cancelled" in [run.outcome for run in engine.served])
        assert (poison.code, poison.reason, poison.retries) == (grpc.StatusCode.INTERNAL, "SIDECAR_FAILED", False)
        assert "the-client's-own-id" in poison.details
        assert (begun.code, begun.reason) == (grpc.StatusCode.UNAVAILABLE, "BACKEND_FAILED")
        assert len(begun.tokens) > 0
        assert (waits.code, waits.reason, waits.retries) == (grpc.StatusCode.UNAVAILABLE, "CRASHED", True)
        assert waits.tokens == []
        assert "Received raised Injected" in sidecar.errors.read_text()
        code, said = replayed(data)
        assert code == CRASHED
        assert "the core raised Injected: raise_on is Received:poison at step" in said
        async with serving([engine], adapters, data_directory=str(data)) as served:
            assert (await served.ask("poison", 4)).tokens == served.expected("poison", 4)


async def answers(http: str, path: str, expected: re.Pattern[str]) -> None:
    """Return once a probe's answer has the expected text."""
    async with httpx.AsyncClient() as client, asyncio.timeout(60):
        while not expected.search((await client.get(f"http://{http}{path}")).text):
            await asyncio.sleep(0.02)


async def test_a_sidecar_that_drains_when_its_core_raises_ends_too(adapters: Path, tmp_path: Path) -> None:
    """SIGTERM came first, and a long answer was waited for: none of that holds up the end."""
    async with running_engine(**SLOW) as engine:
        arguments = ("--backend", f"triton://{engine.grpc_address}", "--adapters", str(adapters))
        async with process("Received:poison", *arguments, folder=tmp_path) as sidecar:
            begun = Ask()
            running = asyncio.create_task(begun.go(sidecar.data, "sql", 2000))
            await begun.begun.wait()
            sidecar.process.send_signal(signal.SIGTERM)
            await answers(sidecar.http, "/readyz", DRAINS)
            refused = await Ask().go(sidecar.data, "chef", 4)
            assert refused.reason == "DRAINING"
            await Ask().go(sidecar.data, "poison", 4)
            sidecar.process.send_signal(signal.SIGTERM)
            await running
            assert await sidecar.exit_code() == CRASHED
            assert begun.code is grpc.StatusCode.UNAVAILABLE


async def test_a_core_that_raises_while_the_process_starts_ends_it(adapters: Path, tmp_path: Path) -> None:
    """Nothing listens yet and no signal is heard; the exit code is the same."""
    arguments = (
        "--backend",
        "triton://127.0.0.1:1",
        "--adapters",
        str(adapters),
        "--data-directory",
        str(tmp_path / "data"),
    )
    async with process("BackendAdded", *arguments, folder=tmp_path) as sidecar:
        assert await sidecar.exit_code() == CRASHED
        assert sidecar.data == ""
    assert "the core on BackendAdded raised Injected" in sidecar.errors.read_text()
    code, said = replayed(tmp_path / "data")
    assert (code, "(BackendAdded), as it did then" in said) == (CRASHED, True)


async def test_it_is_unready_before_the_next_client_event_is_taken(adapters: Path) -> None:
    """Probes, new requests and operators are told at once, while the listeners still listen."""
    async with (
        running_engine(**SLOW) as engine,
        serving([engine], adapters, raise_on="DrainSet") as served,
        httpx.AsyncClient() as http,
    ):
        health: Any = health_pb2_grpc.HealthStub(served.channel)
        ready = f"http://{served.sidecar.http_address}/readyz"
        asked = health_pb2.HealthCheckRequest()
        assert (await http.get(ready)).status_code == 200
        begun = Ask()
        running = asyncio.create_task(begun.go(served.sidecar.data_address, "sql", 2000))
        await begun.begun.wait()
        events = len(served.recorder.events)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await served.backends.Drain(admin_pb2.BackendRequest(backend="trt-0"))
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert "the core on DrainSet raised Injected" in (failed.value.details() or "")
        assert not served.sidecar.gateway.takes_requests
        assert (await http.get(ready)).status_code == 503
        assert (await health.Check(asked)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        late = await Ask().go(served.sidecar.data_address, "chef", 4)
        assert (late.code, late.reason, late.retries) == (grpc.StatusCode.UNAVAILABLE, "DRAINING", True)
        with pytest.raises(grpc.aio.AioRpcError) as asked_in_vain:
            await served.adapters.Evict(admin_pb2.AdapterRequest(name="sql"))
        assert asked_in_vain.value.code() is grpc.StatusCode.INTERNAL
        await running
        assert begun.code is grpc.StatusCode.UNAVAILABLE
        await until(lambda: "cancelled" in [run.outcome for run in engine.served])
        assert not any(isinstance(event, Received) for event in served.recorder.events[events:])


HANGS = """
import asyncio, threading, time
from sidecar.cli.exits import Exit
from sidecar.serve.last_bound import LastBound

async def main():
    LastBound(lambda: None).within(0.2, Exit.CRASHED)
    threading.Thread(target=time.sleep, args=(3600,)).start()  # not a daemon: the interpreter would wait for it
    time.sleep(3600)

asyncio.run(main())
"""


async def test_an_ending_that_hangs_is_ended() -> None:
    """Neither an event loop that stands still nor another thread keeps a process that has crashed."""
    hangs = await asyncio.create_subprocess_exec(sys.executable, "-c", HANGS)
    async with asyncio.timeout(60):
        assert await hangs.wait() == CRASHED
