"""`sidecar state migrate`: a registry from a file into a Redis and back, with all that is in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from sidecar.errors import SidecarError
from sidecar.ownership.effects import SendBeat
from sidecar.ownership.facts import Member
from sidecar.state.records import Record, added, promoted, refreshed
from sidecar.state.redis.members import RedisMembers
from sidecar.state.registry import REGISTRY_FILE, SqliteRegistry, lock_data_directory
from tests.kit.cli_runs import Ended, runner
from tests.kit.redis_servers import Server, running
from tests.kit.registries import adapter, link_to, record, shared_registry


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with running(tmp_path / "server") as server:
        yield server


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return runner(capfd)


async def migrate(command: Callable[..., Ended], *arguments: str) -> Ended:
    return await asyncio.to_thread(command, "state", "migrate", *arguments)


async def a_file(folder: Path) -> list[Record]:
    """Write a data directory with two names, one of three versions, and one that was forgotten; return the records."""
    await asyncio.to_thread(folder.mkdir)
    lock_data_directory(folder).close()
    registry = SqliteRegistry(folder / REGISTRY_FILE)
    await registry.put(record("gone"), None)
    written: Record | None = None
    for seed in range(3):
        grown, _ = added(written, "sql", adapter(seed), f"s3://b/{seed}", now=1e9, labels=(("team", "ä"),))
        await registry.put(grown, written)
        written = grown
    assert written is not None
    await registry.put(promoted(refreshed(written, 2), 1, 30), written)
    await registry.put(record("code", 7, pinned=True, allow=("alice",)), None)
    await registry.delete("gone", record("gone"))
    records = registry.all()
    await registry.close()
    return records


async def test_there_and_back(server: Server, tmp_path: Path, command: Callable[..., Ended]) -> None:
    """Names, versions, pins and shares are as they were, and a watcher's token goes on on either side."""
    records = await a_file(tmp_path / "data")
    ended = await migrate(command, str(tmp_path / "data"), server.url, "--json")
    assert (ended.code, ended.json()) == (
        0,
        {
            "from": str(tmp_path / "data"), "to": server.url, "adapters": 2, "versions": 4, "changes": 7,
            "last_change": 7, "dry_run": False,
        },
    )  # fmt: skip
    async with shared_registry(server.url) as registry:
        assert registry.all() == records
        assert [(change.number, change.name) for change in await registry.changes_after(4)] == [
            (5, "sql"), (6, "code"), (7, "gone"),
        ]  # fmt: skip
        assert await registry.put(record("new"), None) == 8
        assert await registry.put(record("gone", 3), None) == 9
        records = registry.all()
    ended = await migrate(command, server.url, str(tmp_path / "back"))
    assert (ended.code, ended.out) == (0, "copied 4 adapters with 6 versions and 9 changes; the last change is 9\n")
    back = SqliteRegistry(tmp_path / "back" / REGISTRY_FILE)
    assert back.all() == records
    assert [(change.number, change.name) for change in await back.changes_after(7)] == [(8, "new"), (9, "gone")]
    assert await back.put(record("newer"), None) == 10
    await back.close()


async def test_what_is_there_is_replaced_by_force_only(
    server: Server, tmp_path: Path, command: Callable[..., Ended]
) -> None:
    """A dry run writes nothing; a target with something in it is refused and left alone, unless it is forced."""
    records = await a_file(tmp_path / "data")
    source = str(tmp_path / "data" / REGISTRY_FILE)
    assert (await migrate(command, source, server.url, "--dry-run")).code == 0
    async with shared_registry(server.url, key_prefix="other") as registry:
        await registry.put(record("mine"), None)
    assert (await migrate(command, source, server.url)).code == 0
    refused = await migrate(command, source, server.url, "--key-prefix", "other", "--json")
    assert (refused.code, refused.error()["reason"]) == (1, "STATE_NOT_EMPTY")
    async with shared_registry(server.url, key_prefix="other") as registry:
        assert registry.all() == [record("mine")]
    assert (await migrate(command, source, server.url, "--key-prefix", "other", "--force")).code == 0
    async with shared_registry(server.url, key_prefix="other") as registry:
        assert registry.all() == records
    refused = await migrate(command, server.url, source, "--json")
    assert (refused.code, refused.error()["reason"]) == (1, "STATE_NOT_EMPTY")


async def test_nobody_may_be_at_work_on_either(server: Server, tmp_path: Path, command: Callable[..., Ended]) -> None:
    """A data directory that is served, and a Redis where a member beats, are refused with who it is."""
    await a_file(tmp_path / "data")
    lock = lock_data_directory(tmp_path / "data")
    refused = await migrate(command, str(tmp_path / "data"), server.url, "--json")
    assert (refused.code, refused.error()["reason"]) == (3, "DATA_DIRECTORY_IN_USE")
    assert "--" not in refused.error()["message"]  # `serve` and `state` take the directory by different options
    lock.close()
    link = link_to(server.url)
    await RedisMembers(link).beat(SendBeat(1, Member("replica-1", "replica-1")), "", 0)
    await link.close()
    refused = await migrate(command, str(tmp_path / "data"), server.url, "--force", "--json")
    assert (refused.code, refused.error()["reason"]) == (1, "STATE_NOT_EMPTY")
    assert "replica-1" in refused.error()["message"]


async def test_half_a_registry_is_not_served(server: Server) -> None:
    """What an interrupted copy left is refused by replicas."""
    async with server.client() as client:
        await client.hset("{lora-sidecar}:meta", "schema", "unfinished")
    with pytest.raises(SidecarError, match="schema unfinished"):
        async with shared_registry(server.url):
            pass


@pytest.mark.parametrize(
    "url", ["redis://me:s3cret@127.0.0.1:1/0", "redis+nothing://me:s3cret@h:1", "redis://me:s3c@ret@h"]
)
async def test_a_wrong_url_is_told_without_its_password(
    tmp_path: Path, command: Callable[..., Ended], url: str
) -> None:
    """Passwords belong in files; one in a URL is neither used nor repeated."""
    await a_file(tmp_path / "data")
    refused = await migrate(command, str(tmp_path / "data"), url)
    assert refused.code == 2
    assert "s3c" not in refused.err + refused.out
    missing = await migrate(command, str(tmp_path / "nothing"), "redis://127.0.0.1:1")
    assert missing.code == 2
    assert not (tmp_path / "nothing").exists()
