"""The pages on access: what they show is printed, and the configurations in them are accepted."""

from __future__ import annotations

import subprocess

import pytest
import yaml

from sidecar.config import Config
from tools.docs.pages import ROOT, blocks
from tools.docs.run import run

PAGES = [ROOT / "docs" / name for name in ("access.md", "access-policies.md", "credentials.md")]
ENGINES = {"backends": [{"url": "triton://gpu-1:8001"}]}


def test_configurations_are_accepted() -> None:
    """What is a part of a configuration fits into one; a file of keys is a list."""
    shown = [yaml.safe_load(block.text) for page in PAGES for block in blocks(page) if block.language == "yaml"]
    parts = [part for part in shown if isinstance(part, dict)]
    assert len(parts) >= 9
    for part in parts:
        Config.model_validate(ENGINES | part)


@pytest.mark.slow
def test_the_commands_print_what_the_pages_show() -> None:
    """From an open sidecar to one that enforces, and policies of one's own."""
    if subprocess.run(["make", "--question", ".venv/installed"], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("the pages begin with make .venv, which is not to install anything here; run it before")
    assert run(PAGES) == 0
