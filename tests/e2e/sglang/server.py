"""A real SGLang, for tests."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.server import Server
from tests.e2e.sglang.installed import SglangInstalled
from tests.e2e.vllm import guard


class SglangServer(Server):
    """One server of a model: an API server, whose group has the scheduler and the detokenizer."""

    NAME = "SGLang"
    START_S = 300.0  # it takes forty seconds on an idle machine of two cores
    PORTS = 1
    NOISE = re.compile(r"GET /(v1/loads|server_info|v1/models)")
    GUARD = guard

    def __init__(
        self, folder: Path, model: Path, *, batch: int = 4, loaded: int | None = 8, rank: int = 16,
        port: int | None = None, more: Sequence[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(folder, None if port is None else (port,))
        self.installed = SglangInstalled.find()
        self.batch, self.loaded = batch, loaded
        self._model = model
        self._options = [
            "--served-model-name=base", "--host=127.0.0.1", "--device=cpu", "--dtype=float32",
            "--attention-backend=torch_native", "--sampling-backend=pytorch", "--lora-backend=torch_native",
            "--disable-cuda-graph", "--disable-overlap-schedule", "--skip-server-warmup", "--max-total-tokens=20000",
            "--mem-fraction-static=0.2", "--enable-lora", f"--max-lora-rank={rank}", "--lora-target-modules=all",
            f"--max-loras-per-batch={batch}", "--max-running-requests=32",
            *([] if loaded is None else [f"--max-loaded-loras={loaded}"]), *more,
        ]  # fmt: skip
        self._scratch = ""

    @property
    def http_address(self) -> str:
        """Host and port, known after the first start."""
        return self._address(0)

    @property
    def _mark(self) -> str:
        return self._scratch

    @property
    def _ready_url(self) -> str:
        return f"http://{self.http_address}/health"

    def _prepare(self) -> Path:
        self._scratch = tempfile.mkdtemp(prefix="sglang-")  # the names of its sockets are bound to be short
        return Path(self._scratch)

    def _command(self) -> list[str]:
        assert self._ports is not None
        return [*self.installed.serve(self._model), f"--port={self._ports[0]}", *self._options]

    def _environment(self) -> dict[str, str]:
        return self.installed.environment(TMPDIR=self._scratch, OMP_NUM_THREADS="1")
