"""Put SGLang over vLLM's environment: `python -m tests.e2e.sglang.install`; `make e2e-sglang` does it first.

Its own requirements are torch for CUDA and kernels for GPUs, so its packages are installed without dependencies, into a
folder that comes before the environment's own packages.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from tests.e2e.sglang.installed import SglangInstalled
from tests.e2e.vllm.installed import VllmInstalled
from tests.e2e.vllm.newer import install

REQUIREMENTS = Path(__file__).with_name("sglang.txt")


def make(installed: VllmInstalled) -> None:
    """Make the folder unless it is there. Raises RuntimeError with what pip says."""
    made = installed.venv / SglangInstalled.OVER
    if made.exists():
        return
    print(f"installing SGLang into {made}, once: 0.7 GB", flush=True)
    with tempfile.TemporaryDirectory(dir=installed.venv) as scratch:
        folder = Path(scratch) / "made"
        pip = [installed.python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
        said = subprocess.run(
            [*pip, "--target", str(folder), "--requirement", str(REQUIREMENTS)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if said.returncode:
            raise RuntimeError(said.stderr)
        folder.rename(made)


if __name__ == "__main__":
    install(SglangInstalled.OVER, make)
