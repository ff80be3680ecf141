"""What a bundle's `install.sh` refuses before it makes anything."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tools.release.bundle import INSTALL

USAGE = "usage: install.sh FOLDER"
PYTHON = """\
#!/bin/sh
test "$1" = -c && {{ echo {version}; exit 0; }}
mkdir -p "$3/bin"
printf '#!/bin/sh\\necho "$(basename "$0") $*"\\n' > "$3/bin/python"
chmod +x "$3/bin/python"
cp "$3/bin/python" "$3/bin/sidecar"
"""
"""An interpreter that tells a version and makes an environment whose programs print what they are asked."""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with an unpacked bundle and the interpreters of a site."""
    (tmp_path / "bundle").mkdir()
    programs = {"bundle/install.sh": INSTALL.format(version="1.2.0", python="3.11")}
    programs |= {f"python{version}": PYTHON.format(version=version) for version in ("3.11", "3.9")}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    sums = subprocess.run(["sha256sum", "install.sh"], cwd=tmp_path / "bundle", capture_output=True, check=True)
    (tmp_path / "bundle" / "SHA256SUMS").write_bytes(sums.stdout)
    return tmp_path


def install(site: Path, *arguments: str, python: str = "python3.11") -> tuple[int, str]:
    """Return the exit code and the output of the script, run in an empty folder."""
    (site / "here").mkdir(exist_ok=True)
    environment = os.environ | {"PYTHON": str(site / python)}
    done = subprocess.run(
        [site / "bundle" / "install.sh", *arguments], cwd=site / "here", env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [(), ("",), ("a", "b"), ("--hlep",)], ids=str)
def test_misused(site: Path, arguments: tuple[str, ...]) -> None:
    code, told = install(site, *arguments)
    assert (code, USAGE in told, list((site / "here").iterdir())) == (2, True, [])


def test_help(site: Path) -> None:
    code, told = install(site, "--help")
    assert (code, told.startswith(USAGE), list((site / "here").iterdir())) == (0, True, [])


@pytest.mark.parametrize(
    ("python", "told"),
    [
        ("python3.9", "/python3.9 is Python 3.9, the wheels are for 3.11: set PYTHON to a Python 3.11"),
        ("nowhere", "/nowhere does not run: set PYTHON to a Python 3.11"),
    ],
)
def test_another_python(site: Path, python: str, told: str) -> None:
    code, said = install(site, "venv", python=python)
    assert (code, told in said, list((site / "here").iterdir())) == (2, True, [])


def test_the_right_python(site: Path) -> None:
    code, told = install(site, "venv")
    assert code == 0
    assert told.splitlines()[0].startswith("python -m pip install")
    assert told.splitlines()[-1] == "sidecar --version"
