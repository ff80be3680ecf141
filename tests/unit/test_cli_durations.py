"""Durations in options."""

from __future__ import annotations

import pytest

from sidecar.cli.durations import seconds_in
from sidecar.cli.exits import CommandError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("10m", 600), ("12h", 43_200), ("90d", 7_776_000), ("1h30m", 5400), ("1.5h", 5400), ("0s", 0)],
)
def test_a_duration(text: str, seconds: float) -> None:
    assert seconds_in(text, "--for") == seconds


@pytest.mark.parametrize("text", ["", "90", "d", "-1d", "1 d", "1w", "1d ", "1.d", "soon", "1h-30m", "1e3s", "٣d"])
def test_what_is_none(text: str) -> None:
    with pytest.raises(CommandError, match="--for wants a duration such as"):
        seconds_in(text, "--for")
