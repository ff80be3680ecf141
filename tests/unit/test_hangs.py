"""A test that hangs names itself, and what it waits for."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HANGS = """
import asyncio
import threading


async def test_that_hangs():
    async def waits():
        await asyncio.Event().wait()

    threading.Thread(target=threading.Event().wait, name="idler", daemon=True).start()
    await asyncio.create_task(waits(), name="culprit")
"""


@pytest.mark.parametrize("spread", [(), ("-n", "1")], ids=["alone", "by a worker"])
def test_a_test_that_hangs_names_itself_and_what_it_waits_for(tmp_path: Path, spread: tuple[str, ...]) -> None:
    """Its process ends; under xdist that is a worker."""
    file = tmp_path / "test_hanging.py"
    file.write_text(HANGS)
    options = ("-p", "tests.kit.hangs", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "--timeout", "1")
    command = (sys.executable, "-m", "pytest", *options, *spread, "--max-worker-restart", "0", str(file))
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1, said
    assert "test_hanging.py::test_that_hangs has not ended after 1 s" in said
    assert "task culprit in test_hanging.py:8 test_that_hangs.<locals>.waits > " in said
    assert "thread idler:\n" in said
    assert "thread MainThread:\n" in said
    if spread:
        # The path is relative to a clone that lies beside the folder for temporary files.
        assert re.search(r"crashed while running '[^']*test_hanging\.py::test_that_hangs'", said), said
