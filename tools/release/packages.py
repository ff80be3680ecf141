"""Wheel and sdist, and the bill of materials of what the image installs."""

from __future__ import annotations

import sys
import venv
from pathlib import Path

from tools.release.archives import repack
from tools.release.commands import run
from tools.release.source import Source

LOCKS = ("requirements.lock", "deploy/requirements-origins.lock")
"""What the image installs, in this order."""
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def build(tree: Path, source: Source, output: Path, scratch: Path) -> Path:
    """Build the sdist, and the wheel from it; return the wheel."""
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", output, tree)
    run(*command, SOURCE_DATE_EPOCH=str(source.epoch))
    (sdist,) = output.glob("lora_sidecar-*.tar.gz")
    repack(sdist, scratch / "sdist", source.epoch)  # setuptools writes the time of building
    (wheel,) = output.glob("lora_sidecar-*.whl")
    return wheel


def bill_of_materials(tree: Path, wheel: Path, target: Path, scratch: Path) -> None:
    """Install what the image installs, for this Python, and write it as CycloneDX JSON, licences included."""
    environment = scratch / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    install = (*PIP, "--python", python, "install", "--no-deps", "--no-compile")
    for lock in LOCKS:
        run(*install, "--require-hashes", "-r", tree / lock)
    run(*install, wheel)
    run(*PIP, "--python", python, "uninstall", "--yes", "setuptools")
    options = ("--output-reproducible", "--pyproject", tree / "pyproject.toml", "--output-format", "JSON")
    run(sys.executable, "-m", "cyclonedx_py", "environment", *options, "--output-file", target, python)
