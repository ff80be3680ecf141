"""The environment that holds a real SGLang: vLLM's, with a folder of packages before its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tests.e2e.installed import NotInstalled, NotToBeHad
from tests.e2e.vllm.installed import VllmInstalled

ENGINE_SIDE = Path(__file__).parent / "engine_side"
"""Scripts that run in SGLang's environment."""
VERSION = "0.5.23"


@dataclass(frozen=True)
class SglangInstalled(VllmInstalled):
    """vLLM's environment with SGLang over it."""

    OVER: ClassVar[str] = f"sglang-{VERSION}"
    """The folder in the environment."""
    version: ClassVar[str] = VERSION

    def script(self, name: str, *arguments: str) -> list[str]:
        return [self.python, str(ENGINE_SIDE / name), *arguments]

    def serve(self, model: Path) -> list[str]:
        return [self.python, "-m", "sglang.launch_server", f"--model-path={model}"]

    def environment(self, **more: str) -> dict[str, str]:
        over = f"{ENGINE_SIDE / 'over'}:{self.venv / self.OVER}"
        return super().environment(PYTHONPATH=over, SGLANG_USE_CPU_ENGINE="1", **more)

    def _check(self) -> None:
        super()._check()
        reason = self.venv / f"{self.OVER}.missing"
        if reason.exists():
            raise NotToBeHad(f"no SGLang {VERSION} in {self.venv}: {reason.read_text().strip()}")
        if not (self.venv / self.OVER).is_dir():
            raise NotInstalled(f"no {self.OVER} in {self.venv}: python -m tests.e2e.sglang.install")
