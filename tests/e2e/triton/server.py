"""A real `tritonserver`, for tests.

server = TritonServer(tmp_path, Repository(decoupled=True, lora_host_pages=4))
async with server:
    … server.grpc_address, server.metrics_address, server.http_address …
"""

from __future__ import annotations

import os
import re
import secrets
import signal
from pathlib import Path
from typing import Any

from tests.e2e.installed import ROOT
from tests.e2e.processes import Process
from tests.e2e.server import Server
from tests.e2e.triton import guard
from tests.e2e.triton.installed import TritonInstalled
from tests.e2e.triton.repository import Repository
from tests.kit.emulated import read_served

_STUB = "triton_python_backend_stub"
_CONTROL_OPTIONS = {"none": [], "poll": ["--repository-poll-secs=1"], "explicit": ["--load-model=*"]}


class TritonServer(Server):
    """One server over a model repository in `folder`; its group has the stubs of the models, its ports are three.

    `ports` are those of gRPC, HTTP and metrics; by default they are chosen at the first start and kept.
    `control` is Triton's model control: "none", "poll" (every second) or "explicit" (all models are loaded at start).
    `traces` is the URL of an OTLP receiver of traces of all its requests.
    """

    NAME = "tritonserver"
    START_S = 120.0  # it takes two seconds on an idle machine
    PORTS = 3
    NOISE = re.compile(r"^[|+]")  # the tables of its options
    # 24.10 aborts in one start of hundreds, while it makes the regions of its Python models; on a busy machine it may
    # lose a family of metrics that a model has just made, and still has.
    CRASH = re.compile(
        r"ended with (?:-6 [^\0]*boost::interprocess::lock_exception|1 [^\0]*'MetricFamily' has been deleted)"
    )
    GUARD = guard

    def __init__(
        self,
        folder: Path,
        repository: Repository | None = None,
        control: str = "none",
        ports: tuple[int, int, int] | None = None,
        traces: str = "",
    ) -> None:
        super().__init__(folder, ports)
        self.installed = TritonInstalled.find()
        self.repository = repository or Repository()
        self._control = control
        self._traces = traces
        # Regions of the Python backend outlive a killed server: by this name they are told from other servers'.
        self.region_prefix = f"triton_python_backend_shm_region_{secrets.token_hex(6)}_"

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

    def use_ports_of(self, other: TritonServer) -> None:
        """Take another server's ports, in use or not."""
        self._ports = other._ports

    def stubs(self) -> list[Process]:
        """Return the running processes of the Python models."""
        return [process for process in self.processes if _STUB in process.command[0]]

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

    @property
    def _mark(self) -> str:
        return self.region_prefix

    @property
    def _ready_url(self) -> str:
        return f"http://{self.http_address}/v2/health/ready"

    def _prepare(self) -> Path:
        if not self.models_folder.exists():
            self.repository.write(self.models_folder, self.served_path)
        # The models import from where the server runs: their stubs do not look at PYTHONPATH.
        return ROOT

    def _command(self) -> list[str]:
        assert self._ports is not None
        backends = self.installed.link_backends(self.folder / "backends")
        return [
            *self.installed.command(self._ports, self.models_folder, backends),
            f"--backend-config=python,shm-region-prefix-name={self.region_prefix}",
            f"--model-control-mode={self._control}",
            *_CONTROL_OPTIONS[self._control],
            *_traced(self._traces),
        ]

    def _environment(self) -> dict[str, str]:
        return self.installed.environment()


def _traced(url: str) -> list[str]:
    if not url:
        return []
    settings = ("mode=opentelemetry", "rate=1", "level=TIMESTAMPS", f"opentelemetry,url={url}")
    return [f"--trace-config={setting}" for setting in settings]
