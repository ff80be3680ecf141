"""One suite over every registry: in a file, in a Redis and in a Valkey they answer alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from random import Random

import pytest

from sidecar.errors import Reason, Refused
from sidecar.state import records
from sidecar.state.records import Record
from sidecar.state.registry import REGISTRY_FILE, Change, Registry, SqliteRegistry
from tests.kit.redis_servers import running
from tests.kit.registries import adapter, record, shared_registry
from tests.kit.serving import until

KINDS = ("sqlite", "redis-server", "valkey-server")


@dataclass
class Home:
    """Where the records of a test are. `open` gives a registry over them; of a file there is one at a time."""

    open: Callable[[], Awaitable[Registry]]
    is_shared: bool
    opened: list[Registry] = field(default_factory=list)

    async def several(self, count: int) -> list[Registry]:
        """Return registries over the same records; for a file it is one several times."""
        if not self.is_shared:
            return [await self.open()] * count
        return [await self.open() for _ in range(count)]


@pytest.fixture(params=KINDS)
async def home(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Home]:
    async with AsyncExitStack() as stack:
        if request.param == "sqlite":

            async def open_one() -> Registry:
                registry: Registry = SqliteRegistry(tmp_path / REGISTRY_FILE)
                await registry.start()
                stack.push_async_callback(registry.close)
                return registry

        else:
            server = await stack.enter_async_context(running(tmp_path / "server", request.param))

            async def open_one() -> Registry:
                return await stack.enter_async_context(shared_registry(server.url))

        yield Home(open_one, request.param != "sqlite")


async def refusal(write: Awaitable[int]) -> Reason:
    with pytest.raises(Refused) as caught:
        await write
    return caught.value.reason


async def test_what_is_written_is_there_and_outlives_the_registry(home: Home) -> None:
    """A record is known when the write returns, and to a registry that is opened later."""
    registry = await home.open()
    assert (registry.all(), registry.get("sql"), registry.last_change) == ([], None, 0)
    first, second = record("sql"), record("code", 2, pinned=True, allow=("alice",), labels=(("team", "a"),))
    assert await registry.put(first, None) == 1
    assert await registry.put(second, None) == registry.last_change == 2
    assert registry.get("sql") == first
    assert registry.all() == [second, first]
    await registry.close()
    again = await home.open()
    assert (again.all(), again.last_change) == ([second, first], 2)


async def test_a_write_says_what_it_found(home: Home) -> None:
    """Where something else is written by now the write is refused, changes nothing and is told to nobody."""
    registry = await home.open()
    told: list[Change] = []
    registry.subscribe(told.append)
    one = record("sql")
    two = replace(one, pinned=True)
    assert await refusal(registry.put(one, two)) is Reason.CHANGED_MEANWHILE
    assert await refusal(registry.delete("sql", one)) is Reason.CHANGED_MEANWHILE
    await registry.put(one, None)
    assert await refusal(registry.put(two, None)) is Reason.CHANGED_MEANWHILE
    assert await refusal(registry.put(two, two)) is Reason.CHANGED_MEANWHILE
    assert await refusal(registry.delete("sql", two)) is Reason.CHANGED_MEANWHILE
    assert registry.get("sql") == one
    assert [change.number for change in told] == [registry.last_change]


async def test_a_forgotten_name_may_come_again(home: Home) -> None:
    """After a delete the name is nobody's, for those who wrote and for those who are opened later."""
    registry = await home.open()
    one = record("sql")
    await registry.put(one, None)
    await registry.delete("sql", one)
    assert (registry.get("sql"), registry.all()) == (None, [])
    assert await refusal(registry.put(one, one)) is Reason.CHANGED_MEANWHILE
    two = record("sql", 2)
    await registry.put(two, None)
    assert registry.get("sql") == two
    await registry.close()
    assert (await home.open()).all() == [two]


async def test_each_change_is_told_once_in_order_and_before_the_write_returns(home: Home) -> None:
    """A subscriber sees what was written; one that has left sees no more."""
    registry = await home.open()
    told: list[Change] = []
    leave = registry.subscribe(told.append)
    one = record("sql")
    two = replace(one, pinned=True)
    await registry.put(one, None)
    assert told == [Change(1, "sql", one)]
    await registry.put(two, one)
    await registry.delete("sql", two)
    assert told == [Change(1, "sql", one), Change(2, "sql", two), Change(3, "sql", None)]
    leave()
    await registry.put(one, None)
    assert len(told) == 3


async def test_changes_can_be_resumed_from(home: Home) -> None:
    """What came after a number is given again, in order; a number that never was is refused."""
    registry = await home.open()
    one = record("sql")
    await registry.put(one, None)
    await registry.put(record("code", 2), None)
    await registry.delete("sql", one)
    assert await registry.changes_after(0) == [
        Change(1, "sql", one), Change(2, "code", record("code", 2)), Change(3, "sql", None),
    ]  # fmt: skip
    assert await registry.changes_after(2) == [Change(3, "sql", None)]
    assert await registry.changes_after(3) == []
    with pytest.raises(Refused) as caught:
        await registry.changes_after(4)
    assert caught.value.reason is Reason.TOKEN_TOO_OLD
    await registry.close()
    assert [change.number for change in await (await home.open()).changes_after(1)] == [2, 3]


async def test_only_the_last_changes_are_kept(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old token is refused with the numbers that there are."""
    monkeypatch.setattr("sidecar.state.registry.CHANGES_MAX", 5)
    monkeypatch.setattr("sidecar.state.redis.registry.LIMITS", (5, 10_000, 10))
    registry = await home.open()
    for number in range(12):
        await registry.put(record(f"a{number}"), None)
    assert [change.number for change in await registry.changes_after(7)] == [8, 9, 10, 11, 12]
    with pytest.raises(Refused, match="8 to 12") as caught:
        await registry.changes_after(6)
    assert caught.value.reason is Reason.TOKEN_TOO_OLD


async def test_every_part_of_a_record_comes_back(home: Home) -> None:
    """Versions, their labels and generations, shares, holds, pauses and owners."""
    registry = await home.open()
    written: Record | None = None
    for seed in range(3):
        grown, _ = records.added(
            written, "ü/sql", adapter(seed), f"s3://bucket/{seed}", now=1e9 + seed / 3, labels=(("a", "ß"), ("b", "2"))
        )
        await registry.put(grown, written)
        written = grown
    assert written is not None
    last = replace(records.refreshed(records.promoted(written, 1, 20), 2), held_until=2e9, managed_by="config")
    last = replace(last, paused_until=inf)
    await registry.put(last, written)
    await registry.close()
    assert (await home.open()).get("ü/sql") == last


@pytest.mark.parametrize("seed", range(3))
async def test_concurrent_writers_never_undo_each_other(home: Home, seed: int) -> None:
    """Writers of several replicas count up the same few names; every success is one step, and all end alike."""
    registries = await home.several(3)
    told: list[list[Change]] = [[] for _ in registries]
    for registry, heard in zip(registries, told, strict=True):
        registry.subscribe(heard.append)
    names = ("a", "b", "c")
    won = dict.fromkeys(names, 0)
    refusals: list[Reason] = []

    async def write(registry: Registry, random: Random) -> None:
        for _ in range(20):
            name = random.choice(names)
            before = registry.get(name)
            after = record(name) if before is None else records.refreshed(before, 1)
            try:
                number = await registry.put(after, before)
            except Refused as refused:
                refusals.append(refused.reason)
            else:
                won[name] += 1
                assert registry.last_change >= number

    await asyncio.gather(*(write(registry, Random(f"{seed} {n}")) for n, registry in enumerate(registries)))
    assert set(refusals) <= {Reason.CHANGED_MEANWHILE}
    total = sum(won.values())
    await until(lambda: all(registry.last_change == total for registry in registries))
    for registry, heard in zip(registries, told, strict=True):
        assert {name: found.version.generation + 1 for name in names if (found := registry.get(name))} == {
            name: count for name, count in won.items() if count
        }
        assert [change.number for change in heard] == list(range(1, total + 1))
        assert await registry.changes_after(0) == heard
