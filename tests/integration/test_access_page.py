"""The walk-through of docs/access.md, from open to enforced, as a reader would type it."""

from __future__ import annotations

import pytest

from tools.docs.pages import ROOT
from tools.docs.run import run

PAGES = [ROOT / "docs" / name for name in ("access.md", "access-policies.md")]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv/installed").exists(), reason="the pages' commands use .venv; make .venv")
def test_the_commands_of_the_pages_print_what_the_pages_show() -> None:
    """From an open sidecar to one that enforces, then policies of one's own."""
    assert run(PAGES) == 0
