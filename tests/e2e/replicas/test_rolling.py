"""Replicas restarted one after the other under clients as they are written: nothing fails and nothing is lost."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.pool import ChaosPool, chaos_pool
from tests.chaos.rolling import Rolling, rolling_clients
from tests.chaos.scenarios import Marks, restart_all
from tests.kit.serving import until


async def roll(pool: ChaosPool) -> Rolling:
    async with rolling_clients(pool) as rolling:
        await until(lambda: min(rolling.answered.values()) > 10)
        await restart_all(pool, Marks())
        before = dict(rolling.answered)
        await until(lambda: all(rolling.answered[kind] > before[kind] + 10 for kind in before))
    return rolling


async def test_no_request_fails_or_is_lost(tmp_path: Path) -> None:
    """Unary and streamed with gRPC's own retries, and on streams that are held open."""
    async with chaos_pool(tmp_path) as pool:
        rolling = await roll(pool)
    assert not rolling.wrong
    assert rolling.reopened >= len(pool.replicas)
