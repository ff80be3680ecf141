"""Prometheus's own program that checks metrics and rules, of Debian's package prometheus."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

TIMEOUT_S = 600.0


def promtool(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run it to its end, with `text` as its input. Without it a test is skipped on a laptop and fails in CI."""
    path = shutil.which("promtool")
    if path is None:
        reason = "no promtool: apt-get install prometheus"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    command = [path, *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
