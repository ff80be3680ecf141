"""The folders that the configuration names for adapters: what is not there, and what is no longer configured."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.serving import serving


async def test_a_root_that_is_not_there_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the start; one that is there is not told."""
    async with serving([], roots=[tmp_path, tmp_path / "none"]):
        pass
    assert [line.partition("; ")[0] for line in caplog.messages if "adapters.roots" in line] == [
        f"adapters.roots: there is no folder {tmp_path / 'none'}"
    ]
