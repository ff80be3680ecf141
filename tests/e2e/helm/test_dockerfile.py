"""The image: linters find nothing, each step of its Dockerfile works, and what they make serves as in a pod."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.e2e.helm.installed import HelmInstalled
from tests.e2e.installed import ROOT

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
TRIAL = ROOT / "deploy" / "try_dockerfile.py"
CANNOT = 2
"""Its exit code where it cannot be tried."""
TIMEOUT_S = 900.0


def test_hadolint(tools: HelmInstalled) -> None:
    """hadolint has nothing to say."""
    done = tools.run("hadolint", str(DOCKERFILE))
    assert done.returncode == 0, done.stdout


def test_checkov(tools: HelmInstalled) -> None:
    """Nor has checkov, and nothing is skipped for it."""
    done = tools.run("checkov", "-f", str(DOCKERFILE), "--framework", "dockerfile", "--compact", "--skip-download")
    assert done.returncode == 0, done.stdout
    assert "Failed checks: 0, Skipped checks: 0" in done.stdout


def test_steps() -> None:
    """Its steps run in a clean directory; what they make serves, confined, and ends when told."""
    done = subprocess.run([sys.executable, str(TRIAL)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode == CANNOT and not os.environ.get("CI"):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "every step works" in done.stdout
