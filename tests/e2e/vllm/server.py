"""A real vLLM, for tests.

server = VllmServer(tmp_path, toy.model, max_loras=2)
async with server:
    … server.http_address
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from tests.e2e.server import Server
from tests.e2e.vllm import guard
from tests.e2e.vllm.installed import chosen

NICE = 10
"""How far the engine stands back: it keeps a tenth of a processor that something else wants all of."""


class VllmServer(Server):
    """One server of a model: an API server, whose group has the engine and its worker.

    The options are vLLM's own; `runtime_loras` lets adapters be loaded over HTTP. With `rust` its Rust front end
    answers, which loads adapters from the folders `prefixes` only. In `dev_mode` it tells what it was started with.
    """

    NAME = "vLLM"
    START_S = 300.0  # it takes twenty-five seconds on an idle machine of two cores
    PORTS = 1
    NOISE = re.compile(r"\] Route: ")
    GUARD = guard

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
        rust: bool = False,
        prefixes: Sequence[Path] = (),
        dev_mode: bool = False,
        more: Sequence[str] = (),
    ) -> None:
        super().__init__(folder, None if port is None else (port,))
        self.installed = chosen().find()
        assert self.installed.has_rust or not rust, "this vLLM has no Rust front end"
        self.is_rust, self._prefixes = rust, ":".join(map(str, prefixes))
        self._model = model
        self.max_loras, self.max_cpu_loras = max_loras, max_cpu_loras
        self.max_lora_rank, self.max_num_seqs = max_lora_rank, max_num_seqs
        self._options = [
            "--served-model-name=base", "--host=127.0.0.1", "--dtype=float32", "--enable-lora",
            "--enable-server-load-tracking",
            f"--max-model-len={max_model_len}", f"--max-num-seqs={max_num_seqs}", f"--max-loras={max_loras}",
            f"--max-cpu-loras={max_cpu_loras}", f"--max-lora-rank={max_lora_rank}", *more,
        ]  # fmt: skip
        self._runtime_loras, self._dev_mode = runtime_loras, dev_mode
        self._scratch = ""

    @property
    def http_address(self) -> str:
        """Host and port, known after the first start."""
        return self._address(0)

    @property
    def url(self) -> str:
        return f"http://{self.http_address}"

    async def start(self) -> None:
        """Start and return when it is healthy. Raises StartFailed with the end of the log."""
        await super().start()
        self._make_way()

    @asynccontextmanager
    async def engine_held(self) -> AsyncIterator[None]:
        """Keep the engine from making steps for a block: the API server takes requests all the same."""
        engine = self._engine()
        for pid in engine:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in engine:
                os.kill(pid, signal.SIGCONT)

    def _engine(self) -> list[int]:
        """Return the processes of the engine: neither the first one nor the Rust front end's."""
        others = [process for process in self.processes if process.pid != self.pid]
        return [process.pid for process in others if not process.command[0].endswith("vllm-rs")]

    def _make_way(self) -> None:
        """Let everybody else go first: an engine has a device of its own, and this one waits on two spinning cores."""
        for pid in self._engine():
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with suppress(ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, int(thread.name), NICE)

    @property
    def _mark(self) -> str:
        return self._scratch

    @property
    def _ready_url(self) -> str:
        return f"{self.url}/health"

    def _prepare(self) -> Path:
        # The names of its sockets are bound to be short, and folders of tests are not.
        self._scratch = tempfile.mkdtemp(prefix="vllm-")
        return Path(self._scratch)

    def _command(self) -> list[str]:
        assert self._ports is not None
        return [*self.installed.serve(self._model), f"--port={self._ports[0]}", *self._options]

    def _environment(self) -> dict[str, str]:
        more = {
            "TMPDIR": self._scratch,
            "VLLM_CACHE_ROOT": self._scratch,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # Bound to a core, two servers on one machine would share it.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        }
        if self._runtime_loras:
            more["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if self._dev_mode:
            more["VLLM_SERVER_DEV_MODE"] = "1"
        if self.is_rust:
            more |= {"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUNTIME_LORA_ALLOWED_PATH_PREFIXES": self._prefixes}
        return self.installed.environment(**more)
