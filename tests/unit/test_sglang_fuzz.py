"""Damaged and mismatched adapters for SGLang: a few of what `make fuzz` tries."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.sglang import run


def test_none_reaches_an_engine(tmp_path: Path) -> None:
    found = run(range(300), 0, tmp_path)
    assert found["staged"] > 5
    assert found["sent"] > 5
    assert found["no engine fits"] > 10
