"""Replicas restarted one after the other under clients as they are written: nothing fails and nothing is lost."""

from __future__ import annotations

import asyncio
import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from tests.chaos.pool import ChaosPool, chaos_pool
from tests.chaos.rolling import Rolling, rolling_clients
from tests.chaos.scenarios import Marks, restart_all
from tests.kit.serving import until

ROOT = Path(__file__).parents[3]


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


async def test_no_request_fails_beside_replicas_of_the_build_before(tmp_path: Path) -> None:
    """Two of three run what was committed before, as in the middle of an upgrade; then they are upgraded too."""
    async with chaos_pool(tmp_path / "pool", previous=previous_build(tmp_path / "previous")) as pool:
        rolling = await roll(pool)
        assert not rolling.wrong
        for replica in pool.replicas:
            replica.build = None
        async with asyncio.timeout(300):
            rolling = await roll(pool)
        assert not rolling.wrong


def previous_build(folder: Path) -> Path:
    """Return a folder with the code of the last commit but one, or of the last where there are changes since."""
    changed = subprocess.run(["git", "status", "--porcelain", "sidecar", "policies"], cwd=ROOT, capture_output=True)
    commit = "HEAD" if changed.stdout else "HEAD~1"
    found = subprocess.run(["git", "archive", commit, "sidecar", "policies"], cwd=ROOT, capture_output=True)
    if found.returncode:
        pytest.skip(f"there is no commit before: {found.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(found.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder
