"""Replicas restarted one after the other under clients as they are written: nothing fails and nothing is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.chaos.pool import ChaosPool, chaos_pool
from tests.chaos.rolling import Rolling, rolling_clients
from tests.chaos.scenarios import Marks, restart_all
from tests.kit.last_release import source_of_last_release
from tests.kit.serving import until


async def roll(pool: ChaosPool) -> Rolling:
    async with rolling_clients(pool) as rolling:
        await until(lambda: min(rolling.answered.values()) > 10)
        await restart_all(pool, Marks())
        before = dict(rolling.answered)
        await until(lambda: all(rolling.answered[kind] > before[kind] + 10 for kind in before))
    return rolling


@pytest.mark.nightly
async def test_no_request_fails_or_is_lost(tmp_path: Path) -> None:
    """Unary and streamed with gRPC's own retries, and on streams that are held open."""
    async with chaos_pool(tmp_path) as pool:
        rolling = await roll(pool)
    assert not rolling.wrong
    assert rolling.reopened >= len(pool.replicas)


async def test_no_request_fails_beside_replicas_of_the_last_release(tmp_path: Path) -> None:
    """Two of three run the last release, as in the middle of an upgrade; then they are upgraded too."""
    previous = source_of_last_release(tmp_path / "previous", "sidecar", "policies")
    async with chaos_pool(tmp_path / "pool", previous=previous) as pool:
        rolling = await roll(pool)
        assert not rolling.wrong
        for replica in pool.replicas:
            replica.build = None
        async with asyncio.timeout(300):
            rolling = await roll(pool)
        assert not rolling.wrong
