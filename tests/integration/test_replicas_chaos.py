"""Replicas as processes that are killed, stopped and cut off under load: a short form of `make chaos`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.load import FULL
from tests.chaos.pool import chaos_pool
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.trial import trial

SHORT = ("kill-replica", "poison", "stop-owner", "kill-redis", "part-replicas", "kill-engine", "restart-all")


@pytest.mark.slow
async def test_every_answer_is_right_and_comes_once(tmp_path: Path) -> None:
    """One pool through one scenario after the other; each ends with every backend owned and answering."""
    async with chaos_pool(tmp_path) as pool:
        for scenario in SCENARIOS:
            if scenario.name in SHORT:
                verdict = await trial(pool, scenario, calm_s=0.5)
                assert not verdict.wrong, f"{scenario.name}: {verdict.wrong}"
                assert verdict.endings[FULL] > 0
