"""A real `tritonserver` in a process group of its own, for tests: start, stop, kill, freeze, start again.

server = TritonServer(tmp_path, Repository(decoupled=True, lora_host_pages=4))
async with server:
    … server.grpc_address, server.metrics_address, server.http_address …
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.triton import guard
from tests.e2e.triton.installed import Installed
from tests.e2e.triton.processes import Process, free_ports, group_of, ports_of
from tests.e2e.triton.repository import Repository
from tests.emulated import read_served

START_S = 120.0
"""How long a start may take; it takes two seconds on an idle machine."""
STOP_S = 60.0
_TAIL_LINES = 40
_SHARED_MEMORY = Path("/dev/shm")
_STUB = "triton_python_backend_stub"
_TRIES = 3
_CONTROL_OPTIONS = {"none": [], "poll": ["--repository-poll-secs=1"], "explicit": ["--load-model=*"]}


class StartFailed(Exception):
    """The server ended, or was not ready in time; the text has the end of its log."""


class TritonServer:
    """One server over a model repository in `folder`.

    `ports` are those of gRPC, HTTP and metrics; by default they are chosen at the first start and kept.
    `control` is Triton's model control: "none", "poll" (every second) or "explicit" (all models are loaded at start).
    """

    def __init__(
        self,
        folder: Path,
        repository: Repository | None = None,
        control: str = "none",
        ports: tuple[int, int, int] | None = None,
    ) -> None:
        self.installed = Installed.find()
        self.folder = folder
        self.repository = repository or Repository()
        self.log_path = folder / "tritonserver.log"
        self._control = control
        # Regions of the Python backend outlive a killed server: by this name they are told from other servers'.
        self.region_prefix = f"triton_python_backend_shm_region_{secrets.token_hex(6)}_"
        self._ports = ports
        self._process: asyncio.subprocess.Process | None = None
        self._guard: asyncio.subprocess.Process | None = None

    @property
    def grpc_address(self) -> str:
        """Host and port of the gRPC service, known after the first start."""
        return self._address(0)

    @property
    def http_address(self) -> str:
        """Host and port of the HTTP service, known after the first start."""
        return self._address(1)

    @property
    def metrics_address(self) -> str:
        """Host and port of the metrics, known after the first start."""
        return self._address(2)

    @property
    def pid(self) -> int:
        """The server's process, which leads the group of its stubs."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def models_folder(self) -> Path:
        """The model repository."""
        return self.folder / "models"

    @property
    def served_path(self) -> Path:
        """The served log of all engines of this server: a JSON line for each request that ended."""
        return self.folder / "served.jsonl"

    @property
    def served(self) -> list[dict[str, Any]]:
        """The endings so far, oldest first."""
        return read_served(self.served_path) if self.served_path.exists() else []

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """Return the end of the server's log, without the tables of its options."""
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return "\n".join([line for line in text.splitlines() if not line.startswith(("|", "+"))][-lines:])

    def use_ports_of(self, other: TritonServer) -> None:
        """Take another server's ports, in use or not."""
        self._ports = other._ports

    async def start(self) -> None:
        """Start and return when all models are ready. Raises StartFailed with the end of the log."""
        assert not self.is_running, "it runs already"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.models_folder.exists():
            self.repository.write(self.models_folder, self.served_path)
        first = self._ports is None
        for left in reversed(range(_TRIES)):
            self._ports = self._ports or free_ports()
            try:
                await self._start_once()
            except StartFailed as failed:
                if not (first and left and "already in use" in str(failed)):
                    raise
                self._ports = None
            else:
                return

    async def stop(self) -> None:
        """Ask the server to end, as SIGTERM does, and wait until it and its stubs have."""
        if self.is_running:
            assert self._process is not None
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), STOP_S)
            except TimeoutError:
                await self.kill()
        await self._clean_up()

    async def kill(self) -> None:
        """End the server and its stubs as `kill -9` does, and remove the shared memory that they leave."""
        if self.is_running:
            self._signal(signal.SIGKILL)
            assert self._process is not None
            await self._process.wait()
        await self._clean_up()

    def freeze(self) -> None:
        """Stop the server and its stubs where they are; connections stay open and silent."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        self._signal(signal.SIGCONT)

    def stubs(self) -> list[Process]:
        """Return the running processes of the Python models."""
        return [process for process in group_of(self.pid) if _STUB in process.command[0]]

    def stub_pids(self, model: str | None = None) -> list[int]:
        """Return the processes of all Python models, or of one."""
        part = "" if model is None else f"/{model}/"
        return [process.pid for process in self.stubs() if part in " ".join(process.command)]

    def kill_stub(self, model: str) -> list[int]:
        """Kill the processes of a model, which the server does not notice; returns their ids."""
        pids = self.stub_pids(model)
        assert pids, f"no process of {model} runs"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return pids

    async def __aenter__(self) -> TritonServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    def _command(self) -> list[str]:
        assert self._ports is not None
        backends = self.installed.link_backends(self.folder / "backends")
        return [
            *self.installed.command(self._ports, self.models_folder, backends),
            f"--backend-config=python,shm-region-prefix-name={self.region_prefix}",
            f"--model-control-mode={self._control}",
            *_CONTROL_OPTIONS[self._control],
        ]

    async def _start_once(self) -> None:
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                env=self.installed.environment(), start_new_session=True,
            )  # fmt: skip
        self._guard = await asyncio.create_subprocess_exec(
            sys.executable, "-S", guard.__file__, str(self.pid), self.region_prefix,
            stdin=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(START_S):
                await self._ready()
        except TimeoutError as error:
            tail = self.log_tail()
            await self.kill()
            raise StartFailed(f"tritonserver was not ready after {START_S:.0f} s; its log ends with\n{tail}") from error
        except BaseException:
            await self.kill()
            raise

    async def _ready(self) -> None:
        """Wait until this process listens and says that it is ready.

        A port in use ends it only after its models are loaded: until then somebody else answers there.
        """
        assert self._process is not None
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            while True:
                if self._process.returncode is not None:
                    raise StartFailed(
                        f"tritonserver ended with {self._process.returncode}; its log ends with\n{self.log_tail()}"
                    )
                if self._listens() and await self._says_ready(client):
                    return
                await asyncio.sleep(0.02)

    def _listens(self) -> bool:
        try:
            return set(self._ports or ()) <= ports_of(self.pid)
        except OSError:
            return False

    async def _says_ready(self, client: httpx.AsyncClient) -> bool:
        try:
            reply = await client.get(f"http://{self.http_address}/v2/health/ready")
        except httpx.HTTPError:
            return False
        return reply.status_code == httpx.codes.OK

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return

    async def _clean_up(self) -> None:
        """Nothing of this server stays: no stub (they outlive a killed server) and no region."""
        if self._process is None:
            return
        self._signal(signal.SIGKILL)
        async with asyncio.timeout(STOP_S):
            while group_of(self._process.pid):
                await asyncio.sleep(0.01)
        self._remove_regions()
        if self._guard is not None:
            await self._guard.communicate(guard.RELEASED)
            self._guard = None

    def _remove_regions(self) -> None:
        for region in _SHARED_MEMORY.glob(f"{self.region_prefix}*"):
            region.unlink(missing_ok=True)

    def _address(self, index: int) -> str:
        assert self._ports is not None, "not started"
        return f"127.0.0.1:{self._ports[index]}"
