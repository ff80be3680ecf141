"""Put SGLang over vLLM's environment: `python -m tests.e2e.sglang.install`; `make e2e-sglang` does it first.

Its own requirements are torch for CUDA and kernels for GPUs, so its packages are installed without dependencies, into a
folder that comes before the environment's own packages.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.e2e.installed import NotInstalled
from tests.e2e.sglang.installed import SglangInstalled
from tests.e2e.vllm.installed import VllmInstalled

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


def main() -> None:
    try:
        installed = VllmInstalled.find()
    except NotInstalled:
        return  # the tests say why
    missing = installed.venv / f"{SglangInstalled.OVER}.missing"
    try:
        make(installed)
        missing.unlink(missing_ok=True)
    except RuntimeError as error:
        if "No matching distribution" not in str(error):
            raise
        missing.write_text(str(error))
        print(error, file=sys.stderr)


if __name__ == "__main__":
    main()
