"""A real vLLM in a process group of its own, for tests: start, stop, kill, freeze, start again on the same port.

server = VllmServer(tmp_path, toy.model, max_loras=2)
async with server:
    … server.http_address
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import httpx

from tests.e2e.triton.processes import Process, free_ports, group_of, ports_of, state_of
from tests.e2e.vllm import guard
from tests.e2e.vllm.installed import Installed

START_S = 300.0
"""How long a start may take; it takes twenty-five seconds on an idle machine of two cores."""
STOP_S = 60.0
_TAIL_LINES = 40
_LOOK_S = 0.05


class StartFailed(Exception):
    """The server ended, or was not ready in time; the text has the end of its log."""


class VllmServer:
    """One server of a model; `port` is chosen at the first start and kept if it is not given.

    The options are vLLM's own; `runtime_loras` lets adapters be loaded over HTTP.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        port: int | None = None,
        max_loras: int = 2,
        max_cpu_loras: int = 4,
        max_lora_rank: int = 16,
        max_num_seqs: int = 64,
        max_model_len: int = 1024,
        runtime_loras: bool = True,
        more: Sequence[str] = (),
    ) -> None:
        self.installed = Installed.find()
        self.folder = folder
        self.max_loras, self.max_cpu_loras = max_loras, max_cpu_loras
        self.max_lora_rank, self.max_num_seqs = max_lora_rank, max_num_seqs
        self.log_path = folder / "vllm.log"
        self._options = [
            f"--model={model}", "--served-model-name=base", "--host=127.0.0.1", "--dtype=float32", "--enable-lora",
            "--enable-server-load-tracking",
            f"--max-model-len={max_model_len}", f"--max-num-seqs={max_num_seqs}", f"--max-loras={max_loras}",
            f"--max-cpu-loras={max_cpu_loras}", f"--max-lora-rank={max_lora_rank}", *more,
        ]  # fmt: skip
        self._runtime_loras = runtime_loras
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._scratch: Path | None = None
        self._regions: set[str] = set()

    @property
    def http_address(self) -> str:
        """Host and port, known after the first start."""
        assert self._port is not None, "not started"
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        return f"http://{self.http_address}"

    @property
    def pid(self) -> int:
        """The API server's process, which leads the group of the engine's."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def processes(self) -> list[Process]:
        """The running processes: API server, engine, worker."""
        return group_of(self.pid)

    def log_tail(self, lines: int = _TAIL_LINES) -> str:
        """Return the end of the server's log, without the list of its routes."""
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return "\n".join([line for line in text.splitlines() if "] Route: " not in line][-lines:])

    async def start(self) -> None:
        """Start and return when it is healthy. Raises StartFailed with the end of the log."""
        assert not self.is_running, "it runs already"
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._port is None:
            self._port = free_ports()[0]
        # The names of its sockets are bound to be short, and folders of tests are not.
        self._scratch = Path(tempfile.mkdtemp(prefix="vllm-"))
        with self.log_path.open("ab") as log:
            command = [self.installed.python, "-m", "vllm.entrypoints.openai.api_server", f"--port={self._port}"]
            self._process = subprocess.Popen(  # noqa: ASYNC220 — shared by tests, each of which has its own event loop
                [*command, *self._options], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._environment(), cwd=self._scratch, process_group=0,
            )  # fmt: skip
        self._guard = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-S", guard.__file__, str(self.pid), str(self._scratch)],
            stdin=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(START_S):
                await self._ready()
        except TimeoutError as error:
            tail = self.log_tail()
            await self._give_up()
            raise StartFailed(f"vLLM was not ready after {START_S:.0f} s; its log ends with\n{tail}") from error
        except BaseException:
            await self._give_up()
            raise
        self._make_way()
        # Looked up now, so that a kill comes as suddenly as it should.
        self._regions = guard.shared_memory(self.pid)

    async def stop(self) -> None:
        """Ask the server to end, as SIGTERM does, and wait until it and its engine have."""
        if self.is_running:
            os.kill(self.pid, signal.SIGTERM)
            try:
                await self.ended(STOP_S)
            except TimeoutError:
                self.thaw()
        await self.kill()

    async def kill(self) -> None:
        """End all its processes as `kill -9` does, and leave nothing of them."""
        if self._process is None:
            return
        guard.end(self.pid, self._regions)
        self._process.wait()
        async with asyncio.timeout(STOP_S):
            while group_of(self.pid):
                await asyncio.sleep(_LOOK_S)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if self._guard is not None:
            self._guard.communicate(guard.RELEASED)
            self._guard = None

    async def ended(self, patience_s: float = STOP_S) -> int:
        """Wait until the API server ends by itself and return its exit status. Raises TimeoutError."""
        assert self._process is not None
        async with asyncio.timeout(patience_s):
            while (status := self._process.poll()) is None:
                await asyncio.sleep(_LOOK_S)
        return status

    def freeze(self) -> None:
        """Stop all its processes where they are; connections stay open and silent."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        self._signal(signal.SIGCONT)

    @asynccontextmanager
    async def engine_held(self) -> AsyncIterator[None]:
        """Keep the engine from making steps for a block: the API server takes requests all the same."""
        engine = [process.pid for process in self.processes if process.pid != self.pid]
        for pid in engine:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in engine:
                os.kill(pid, signal.SIGCONT)

    async def __aenter__(self) -> VllmServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def _give_up(self) -> None:
        self._regions = guard.shared_memory(self.pid)
        await self.kill()

    def _make_way(self) -> None:
        """Let everybody else go first: an engine has a device of its own, where this one waits on two spinning cores.

        The processes are in our session, since Linux weighs sessions before it looks at what is nice.
        """
        for process in self.processes:
            if process.pid != self.pid:
                for thread in Path(f"/proc/{process.pid}/task").iterdir():
                    os.setpriority(os.PRIO_PROCESS, int(thread.name), 19)

    def _environment(self) -> dict[str, str]:
        more = {
            "TMPDIR": str(self._scratch),
            "VLLM_CACHE_ROOT": str(self._scratch),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # Bound to a core, two servers on one machine would share it.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }
        if self._runtime_loras:
            more["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        return self.installed.environment(**more)

    async def _ready(self) -> None:
        """Wait until this process listens and says that it is healthy: somebody else may answer at its port."""
        assert self._process is not None
        started = monotonic()
        async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
            while True:
                if self._process.poll() is not None:
                    raise StartFailed(
                        f"vLLM ended with {self._process.returncode} after {monotonic() - started:.0f} s; its log ends "
                        f"with\n{self.log_tail()}"
                    )
                if self._listens() and await self._says_healthy(client):
                    return
                await asyncio.sleep(_LOOK_S)

    def _listens(self) -> bool:
        if state_of(self.pid) in "ZX":
            return False
        try:
            return self._port in ports_of(self.pid)
        except OSError:
            return False

    async def _says_healthy(self, client: httpx.AsyncClient) -> bool:
        try:
            reply = await client.get(f"{self.url}/health")
        except httpx.HTTPError:
            return False
        return reply.status_code == httpx.codes.OK

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return
