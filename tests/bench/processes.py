"""Processes that are measured: a sidecar as `sidecar serve` runs it, a bare relay beside it, and their CPU time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

RUN_SIDECAR = "from sidecar.cli import main; main()"
WITHOUT_UVLOOP = "import sys; sys.modules['uvloop'] = None; "


class Measured:
    """A child process, Python unless said otherwise, that prints one JSON line when ready and ends on SIGTERM."""

    def __init__(self, *arguments: str, program: str = sys.executable) -> None:
        self._program = program
        self._arguments = arguments
        self._process: asyncio.subprocess.Process | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 — it is closed when the process has ended
        self.ready: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            self._program, *self._arguments, stdout=asyncio.subprocess.PIPE, stderr=self._errors
        )
        await self._become_ready(self._process)
        return self

    async def _become_ready(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            await process.wait()
            raise RuntimeError(f"{self._arguments[:3]} did not start: {self.errors()}")
        self.ready = json.loads(line)

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(10):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._errors.close()

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def errors(self) -> str:
        """Return the last of what the process wrote to standard error."""
        return self.logged()[-4000:]

    def logged(self) -> str:
        """Return what the process has written to standard error so far."""
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), size, 0).decode(errors="replace")  # its own place stays where it is

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def cpu_s(self) -> float:
        """Return the CPU seconds of the process and its threads so far."""
        return cpu_s(self.pid)


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and its threads so far, to the nanosecond.

    `psutil` has them in hundredths only; a process's CPU clock has this id by clock_getcpuclockid(3).
    """
    return time.clock_gettime(~pid << 3 | 2)


class SidecarProcess(Measured):
    """`sidecar serve` in front of engines, on free ports; `settings` are keys of the configuration.

    With `picks` it is Envoy's endpoint picker, too.
    """

    def __init__(
        self,
        folder: Path,
        backends: Sequence[dict[str, Any]],
        uvloop: bool = True,
        picks: bool = False,
        **settings: Any,
    ) -> None:
        free = {"address": "127.0.0.1:0"}
        listeners = {"data": free, "admin": free, "http": free, **({"endpoint_picker": free} if picks else {})}
        config = {"backends": list(backends), "listeners": listeners, **settings}
        path = folder / f"sidecar-{id(self)}.yaml"
        path.write_text(json.dumps(config))
        code = ("" if uvloop else WITHOUT_UVLOOP) + RUN_SIDECAR
        super().__init__("-c", code, "serve", "--config", str(path), "--json")

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        async with asyncio.timeout(30), httpx.AsyncClient(trust_env=False) as client:
            while (await client.get(f"http://{self.http}/readyz")).status_code != 200:
                await asyncio.sleep(0.05)
        return self

    @property
    def data(self) -> str:
        return str(self.ready["data"])

    @property
    def admin(self) -> str:
        return str(self.ready["admin"])

    @property
    def http(self) -> str:
        return str(self.ready["http"])

    @property
    def endpoint_picker(self) -> str:
        return str(self.ready["endpoint_picker"])

    async def metrics(self) -> dict[tuple[str, tuple[str, ...]], float]:
        """Return every sample of `/metrics` by name, without the prefix, and label values."""
        return await metrics_of(self.http)


async def metrics_of(address: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return every sample of the `/metrics` at HOST:PORT by name, without the prefix, and label values."""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        text = (await client.get(f"http://{address}/metrics")).text
    return {
        (sample.name.removeprefix("lora_sidecar_"), tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class RelayProcess(Measured):
    """A bare `grpc.aio` relay of the same messages: what any Python process in this place costs."""

    def __init__(self, engine: str, uvloop: bool = True) -> None:
        super().__init__("-m", "tests.bench.bare_relay", engine, *(["--uvloop"] if uvloop else []))

    @property
    def data(self) -> str:
        return str(self.ready["data"])


def backend_of(engine: Any, /, identity: str = "trt-0", **fields: Any) -> dict[str, Any]:
    """Return a backend's entry in the configuration."""
    metrics = f"http://{engine.metrics_address}/metrics"
    return {"url": f"triton://{engine.grpc_address}", "id": identity, "metrics": metrics, **fields}
