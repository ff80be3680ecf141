"""Engines receive what they have received before, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.engine_wires import KINDS, WIRES, recorded


@pytest.mark.parametrize("kind", KINDS)
async def test_an_engine_receives_what_it_has_received_before(tmp_path: Path, kind: str) -> None:
    assert await recorded(kind, tmp_path) == (WIRES / f"{kind}.jsonl").read_text().splitlines()
