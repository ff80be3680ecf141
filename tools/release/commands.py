"""Run the programs that build a release, and say which of them failed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SHOWN = 2000
"""Characters of a failed program's output that are shown."""


class Refused(Exception):
    """The release cannot be built; the text says why and what to do."""


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """Run a program and return its standard output. Raises Refused if it fails or is missing."""
    words = [str(word) for word in command]
    environment = os.environ | variables
    try:
        done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Refused(f"{words[0]} is not installed") from error
    if done.returncode:
        raise Refused(f"{' '.join(words[:6])} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-SHOWN:]}")
    return done.stdout
