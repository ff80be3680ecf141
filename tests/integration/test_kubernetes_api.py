"""The API client and what follows a collection, against a server that goes wrong in every way that the real one may."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from sidecar.kubernetes.api import Api
from sidecar.kubernetes.failures import ApiError
from sidecar.kubernetes.mirror import Mirror
from sidecar.kubernetes.pauses import Pauses
from tests.kit.kubernetes_api import Fault
from tests.kit.kubernetes_cluster import Cluster, cluster, needs_faults, on_clusters
from tests.kit.serving import until

MAPS = "configmaps"


@dataclass
class Seen:
    """What a mirror has yielded: each snapshot as the values of its objects by name."""

    snapshots: list[dict[str, str]] = field(default_factory=list)

    @property
    def last(self) -> dict[str, str] | None:
        return self.snapshots[-1] if self.snapshots else None


@asynccontextmanager
async def mirrored(home: Cluster) -> AsyncIterator[Seen]:
    """Follow a cluster's ConfigMaps that the test has made."""
    api, seen = Api(home.access), Seen()

    async def follow() -> None:
        collection = home.collection(MAPS)
        async with aclosing(Mirror(api, collection, Pauses(0.01, 0.05), Pauses(0.01, 0.05)).watch()) as snapshots:
            async for objects in snapshots:
                seen.snapshots.append({name: each["data"]["v"] for name, each in objects.items() if "data" in each})

    task = asyncio.create_task(follow())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await api.close()


def a_map(name: str, value: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"v": value}}


def own(seen: Seen) -> dict[str, str]:
    """Return what a mirror saw last, without what a real cluster puts into every namespace."""
    return {name: value for name, value in (seen.last or {}).items() if not name.startswith("kube-root")}


@on_clusters
async def test_a_mirror_follows(kind: str) -> None:
    """What is there, what comes, what changes, what goes."""
    async with cluster(kind) as home:
        await home.create(MAPS, a_map("a", "1"))
        async with mirrored(home) as seen:
            await until(lambda: own(seen) == {"a": "1"})
            await home.create(MAPS, a_map("b", "1"))
            await home.patch(MAPS, "a", {"data": {"v": "2"}})
            await until(lambda: own(seen) == {"a": "2", "b": "1"})
            await home.delete(MAPS, "b")
            await until(lambda: own(seen) == {"a": "2"})


@on_clusters
async def test_a_watch_that_ends_by_itself_goes_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From where it was, as a server ends every watch: nothing is missed, and nothing is listed anew."""
    asked: list[str] = []

    def counted(name: str, original: Any) -> Any:
        return lambda *given: asked.append(name) or original(*given)

    for name in ("list", "watch"):
        monkeypatch.setattr(Api, name, counted(name, getattr(Api, name)))
    monkeypatch.setattr("sidecar.kubernetes.api.WATCH_S", (1.0, 1.0))
    async with cluster(kind) as home, mirrored(home) as seen:
        for number in range(1, 4):
            await until(lambda count=number: asked.count("watch") > count)  # type: ignore[misc]
            await home.create(MAPS, a_map(f"m{number}", "1"))
            await until(lambda count=number: len(own(seen)) == count)  # type: ignore[misc]
        assert asked.count("list") == 1


@on_clusters
async def test_a_long_list_comes_in_pages(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is yielded before the last page is there."""
    monkeypatch.setattr("sidecar.kubernetes.api.PAGE_MAX", 3)
    async with cluster(kind) as home:
        for number in range(8):
            await home.create(MAPS, a_map(f"m{number}", "1"))
        async with mirrored(home) as seen:
            await until(lambda: bool(seen.snapshots))
            assert len(own(seen)) == 8
            assert len({frozenset(snapshot) for snapshot in seen.snapshots}) == 1


@needs_faults
async def test_pages_that_expire_are_listed_anew(kind: str) -> None:
    """A continue token that is forgotten (410) begins the list over: half a list is never taken for all."""
    async with cluster(kind, page_max=2) as home:
        for number in range(5):
            await home.create(MAPS, a_map(f"m{number}", "1"))
        api = Api(home.access)
        try:
            listed = home.fake._page

            def forgetful(asked: Any) -> Any:
                if asked.query.get("continue") and home.fake.count("list") == 2:
                    home.fake.forget_pages()
                return listed(asked)

            home.fake._page = forgetful  # type: ignore[method-assign]
            listing = await api.list(home.collection(MAPS))
            assert [item["metadata"]["name"] for item in listing.items] == [f"m{n}" for n in range(5)]
            assert home.fake.count("list") == 2 + 3
        finally:
            await api.close()


@needs_faults
@pytest.mark.parametrize("gone_as", ["status", "event"])
async def test_a_history_that_is_forgotten_is_listed_anew(kind: str, gone_as: str) -> None:
    """410, as an answer or as an event of the watch: what has happened meanwhile is seen all the same."""
    async with cluster(kind, gone_as=gone_as) as home:
        await home.create(MAPS, a_map("a", "1"))
        await home.create(MAPS, a_map("b", "1"))
        async with mirrored(home) as seen:
            await until(lambda: home.fake.watching(MAPS))
            await home.fake.stop()
            home.fake.objects.delete(("", "ml", MAPS), "a")
            home.fake.objects.create(("", "ml", MAPS), a_map("c", "1"))
            home.fake.objects.forget()
            await home.fake.start()
            await until(lambda: own(seen) == {"b": "1", "c": "1"})
            assert all("b" in snapshot for snapshot in seen.snapshots)
            assert home.fake.count("list", MAPS) == 2


@needs_faults
async def test_a_server_that_lost_its_history_is_listed_anew(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restore it counts from an earlier number on, and a watch from a later one ends without a word."""
    monkeypatch.setattr("sidecar.kubernetes.api.WATCH_S", (1.0, 1.0))
    async with cluster(kind) as home:
        for value in range(20):
            await home.create(MAPS, a_map(f"m{value}", "1"))
        async with mirrored(home) as seen:
            await until(lambda: len(own(seen)) == 20)
            await home.fake.stop()
            home.fake.objects.lose(15)
            await home.fake.start()
            await home.patch(MAPS, "m3", {"data": {"v": "2"}})
            await until(lambda: own(seen).get("m3") == "2")
            assert len(own(seen)) == 20


@needs_faults
async def test_a_bookmark_moves_a_watch_on(kind: str) -> None:
    """After one, a history that is forgotten up to there costs no new list."""
    async with cluster(kind) as home, mirrored(home) as seen:
        await until(lambda: home.fake.watching(MAPS))
        await home.create(MAPS, a_map("a", "1"))
        await until(lambda: own(seen) == {"a": "1"})
        await home.fake.bookmark()
        home.fake.objects.forget()
        watches = home.fake.count("watch")
        home.fake.cut_in_an_event()
        await until(lambda: home.fake.count("watch") > watches and home.fake.watching(MAPS))
        await home.create(MAPS, a_map("b", "1"))
        await until(lambda: own(seen) == {"a": "1", "b": "1"})
        assert home.fake.count("list", MAPS) == 1


@needs_faults
async def test_an_event_that_is_cut_off_never_happened(kind: str) -> None:
    """The watch goes on from the last whole one; nothing is listed anew, nothing that was not is seen."""
    async with cluster(kind) as home, mirrored(home) as seen:
        for number in range(10):
            await until(lambda: home.fake.watching(MAPS))
            home.fake.cut_in_an_event()
            await home.create(MAPS, a_map(f"m{number}", "1"))
            await until(lambda count=number + 1: len(own(seen)) == count)  # type: ignore[misc]
        assert not any("never-was" in snapshot for snapshot in seen.snapshots)
        assert home.fake.count("list", MAPS) == 1


@needs_faults
async def test_no_failure_takes_anything_away(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """403, 429, 500, half an answer, nobody there: what was seen stays, and each trouble is logged once."""
    async with cluster(kind) as home:
        await home.create(MAPS, a_map("a", "1"))
        async with mirrored(home) as seen:
            await until(lambda: home.fake.watching(MAPS))
            for status in (403, 429, 500, 504):
                home.fake.faults.append(Fault("watch", MAPS, status=status, times=8))
                home.fake.faults.append(Fault("list", MAPS, status=status, times=2))
                home.fake.cut()
                await until(lambda: not home.fake.faults and home.fake.watching(MAPS))
            home.fake.faults += [Fault("watch", MAPS, status=500, times=8), Fault("list", MAPS, cut=True, times=2)]
            home.fake.cut()
            await until(lambda: not home.fake.faults and home.fake.watching(MAPS))
            await home.fake.stop()
            await home.fake.start()
            await home.create(MAPS, a_map("b", "1"))
            await until(lambda: own(seen) == {"a": "1", "b": "1"})
            assert all("a" in snapshot for snapshot in seen.snapshots)
        told = [line.getMessage() for line in caplog.records if "403" in line.getMessage()]
        assert len(told) == 2  # of the watch, and of the list
        assert "Role" in told[0]


@needs_faults
async def test_a_busy_server_says_when_to_come_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """429 with Retry-After: it is not asked before that."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async with cluster(kind) as home:
        home.fake.faults.append(Fault("list", MAPS, status=429, retry_after="7"))
        api = Api(home.access)
        mirror = Mirror(api, home.collection(MAPS), Pauses(0.01, 0.05))
        with monkeypatch.context() as patched:
            patched.setattr("sidecar.kubernetes.mirror.asyncio.sleep", sleep)
            async with aclosing(mirror.watch()) as snapshots:
                assert await anext(snapshots) == {}
        await api.close()
        assert slept == [7.0]


@needs_faults
async def test_a_slow_server_is_given_up_and_asked_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that does not come is a failure like others."""
    async with cluster(kind) as home:
        await home.create(MAPS, a_map("a", "1"))
        home.fake.faults.append(Fault("list", MAPS, stall=True))
        monkeypatch.setattr("sidecar.kubernetes.api.TIMEOUT", 0.2)
        api = Api(home.access)
        monkeypatch.undo()
        with pytest.raises(ApiError, match="no answer"):
            await api.list(home.collection(MAPS))
        await api.close()
        api = Api(home.access)
        assert len((await api.list(home.collection(MAPS))).items) == 1
        await api.close()
