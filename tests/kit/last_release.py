"""The files of the last release, from this repository's history, for upgrade tests.

Tests upgrade from it and go back to it (`make e2e-release`) and run it beside this code (`make e2e-replicas`). Each
release updates `LAST_RELEASE`.
"""

from __future__ import annotations

import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

LAST_RELEASE = "03b1f24dee1813593a82abdc8ed6f40ee7a6b907"
"""A commit or a tag; this commit is 0.1.0."""
_ROOT = Path(__file__).parents[2]


def source_of_last_release(folder: Path, *paths: str) -> Path:
    """Write the release's files below `paths`, or all of them, into a folder and return it.

    Skips the test where the clone is too shallow to have the release.
    """
    found = subprocess.run(["git", "archive", LAST_RELEASE, *paths], cwd=_ROOT, capture_output=True, check=False)
    if found.returncode:
        problem = f"no {LAST_RELEASE} here (git fetch --unshallow): {found.stderr.decode().strip()}"
        pytest.skip(problem)
    with tarfile.open(fileobj=BytesIO(found.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder
