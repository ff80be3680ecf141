"""A pool's backends follow what is found: added, sent nothing new, removed when nothing runs there any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from sidecar.discovery.following import Follower
from sidecar.discovery.found import Finder, Found
from sidecar.errors import Misused, Reason
from tests.kit.serving import until


class Ledger:
    """Notes what is done with engines (`discovery.following.Engines`). `busy` are those where something runs."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.leaving: set[str] = set()
        self.busy: set[str] = set()
        self.wrong: set[str] = set()
        self.may_remove = asyncio.Event()
        self.may_remove.set()

    async def add(self, found: Found, fresh: bool) -> None:
        if found.name in self.wrong:
            raise Misused(Reason.CONFIG_INVALID, "its TLS files cannot be read")
        self.done.append(f"{'new' if fresh else 'first'} {found.name} {found.address}")

    def leave(self, name: str, leaving: bool) -> None:
        (self.leaving.add if leaving else self.leaving.discard)(name)

    def is_done(self, name: str) -> bool:
        return name not in self.busy

    async def remove(self, name: str, cause: str) -> None:
        self.done.append(f"removing {name}")
        await self.may_remove.wait()
        self.done.append(f"removed {name}: {cause}")
        self.leaving.discard(name)


class Told(Finder):
    """Yields what it is told to."""

    def __init__(self) -> None:
        self.sets: asyncio.Queue[frozenset[Found] | Exception] = asyncio.Queue()

    async def watch(self) -> AsyncIterator[frozenset[Found]]:
        while True:
            found = await self.sets.get()
            if isinstance(found, Exception):
                raise found
            yield found


@asynccontextmanager
async def following(grace_s: float = 0.0, drain_s: float = 60.0) -> AsyncIterator[tuple[Follower, Ledger]]:
    ledger = Ledger()
    follower = Follower(Told(), ledger, grace_s, drain_s)
    yield follower, ledger
    await follower.stop()


def at(name: str, address: str = "", ready: bool = True, terminating: bool = False) -> Found:
    return Found(name, address or f"{name}:1", ready, terminating)


async def test_what_is_there_first_is_not_new() -> None:
    async with following() as (follower, ledger):
        await follower.see(frozenset({at("b"), at("a")}))
        await follower.see(frozenset({at("b"), at("a"), at("c")}))
        assert ledger.done == ["first a a:1", "first b b:1", "new c c:1"]


async def test_one_that_is_not_ready_is_added_when_it_is() -> None:
    async with following() as (follower, ledger):
        await follower.see(frozenset({at("a", ready=False), at("b", terminating=True)}))
        assert ledger.done == []
        await follower.see(frozenset({at("a"), at("b", terminating=True)}))
        assert ledger.done == ["new a a:1"]


@pytest.mark.parametrize("now", [at("a", ready=False), at("a", terminating=True)])
async def test_one_that_is_not_ready_any_more_is_sent_nothing_and_stays(now: Found) -> None:
    async with following() as (follower, ledger):
        await follower.see(frozenset({at("a")}))
        await follower.see(frozenset({now}))
        assert ledger.leaving == {"a"}
        await follower.see(frozenset({at("a")}))
        assert ledger.leaving == set()
        assert ledger.done == ["first a a:1"]


async def test_one_that_is_gone_is_removed_when_nothing_runs_there() -> None:
    async with following() as (follower, ledger):
        await follower.see(frozenset({at("a"), at("b")}))
        ledger.busy.add("a")
        await follower.see(frozenset())
        await until(lambda: "removed b: b:1 is no longer found" in ledger.done)
        assert ledger.leaving == {"a"}
        assert "removing a" not in ledger.done
        ledger.busy.clear()
        await until(lambda: "removed a: a:1 is no longer found" in ledger.done)


async def test_what_runs_there_is_not_waited_for_for_ever() -> None:
    async with following(drain_s=0.05) as (follower, ledger):
        await follower.see(frozenset({at("a")}))
        ledger.busy.add("a")
        await follower.see(frozenset())
        await until(lambda: "removed a: a:1 is no longer found" in ledger.done)


async def test_one_that_is_found_again_in_time_stays_what_it_was() -> None:
    async with following(grace_s=60.0) as (follower, ledger):
        await follower.see(frozenset({at("a")}))
        await follower.see(frozenset())
        assert ledger.leaving == {"a"}
        await follower.see(frozenset({at("a")}))
        assert ledger.leaving == set()
        assert ledger.done == ["first a a:1"]


async def test_one_that_comes_back_while_it_is_being_removed_is_added_after_that() -> None:
    async with following() as (follower, ledger):
        await follower.see(frozenset({at("a")}))
        ledger.may_remove.clear()
        await follower.see(frozenset())
        await until(lambda: "removing a" in ledger.done)
        await follower.see(frozenset({at("a")}))
        assert ledger.done[-1] == "removing a"
        ledger.may_remove.set()
        await until(lambda: ledger.done[-1] == "new a a:1")
        assert ledger.done[-2] == "removed a: a:1 is no longer found"


async def test_a_name_at_another_address_is_another_engine() -> None:
    """A pod of a StatefulSet that was started anew: the old one is removed first, without a grace."""
    async with following(grace_s=60.0) as (follower, ledger):
        await follower.see(frozenset({at("a")}))
        await follower.see(frozenset({at("a", "elsewhere:1")}))
        await until(lambda: ledger.done[-1] == "new a elsewhere:1")
        assert ledger.done[1:3] == ["removing a", "removed a: a:1 is no longer found"]


async def test_one_that_cannot_be_had_keeps_nobody_else_away(caplog: pytest.LogCaptureFixture) -> None:
    async with following() as (follower, ledger):
        ledger.wrong.add("a")
        await follower.see(frozenset({at("a"), at("b")}))
        assert ledger.done == ["first b b:1"]
        assert "the engine a at a:1 is left out: its TLS files cannot be read" in caplog.text


async def test_a_finder_that_fails_is_asked_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.discovery.following.AGAIN_S", 0.0)
    finder, ledger = Told(), Ledger()
    follower = Follower(finder, ledger, 0.0, 60.0)
    follower.start()
    for told in (frozenset({at("a")}), RuntimeError("as the test wants it"), frozenset({at("a"), at("b")})):
        finder.sets.put_nowait(told)
    await until(lambda: ledger.done == ["first a a:1", "new b b:1"])
    assert "discovery failed" in caplog.text
    await follower.stop()
