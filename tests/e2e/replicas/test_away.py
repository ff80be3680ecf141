"""Redis away for many times as long as a lease: `python -m tests.chaos --away 600` is the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.away import away
from tests.chaos.pool import chaos_pool


@pytest.mark.nightly
async def test_answers_go_on_and_registration_is_refused(tmp_path: Path) -> None:
    async with chaos_pool(tmp_path) as pool:
        told = await away(pool, tmp_path, calm_s=5.0, away_s=20.0)
    assert not told.wrong
    assert told.without > 0
    assert told.refusals
    assert all(said.startswith("UNAVAILABLE") and "Redis" in said and "try again" in said for said in told.refusals)
