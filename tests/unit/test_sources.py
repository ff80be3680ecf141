"""Sources: downloads are shared, what nobody needs goes, and what is lost or damaged is fetched again."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.origins.limits import Limits, Surroundings
from sidecar.adapters.spool import Spool, digest_of_folder
from sidecar.errors import Invalid, Reason, Refused
from sidecar.shell.sources import Sources, surroundings_of
from tests.kit.faulty_http import Fault, FaultyServer, faulty_server
from tests.kit.origins import World
from tests.kit.peft_files import write_adapter
from tests.kit.serving import until

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    with faulty_server() as running:
        running.serve("sql", write_adapter(tmp_path / "origin"))
        yield running


@pytest.fixture
async def sources(server: FaultyServer, tmp_path: Path) -> AsyncIterator[Sources]:
    made = sources_at(server, tmp_path)
    yield made
    made.close()


def sources_at(server: FaultyServer, tmp_path: Path, **options: Any) -> Sources:
    """Return sources that may ask the server, in a world where waits are over at once."""
    allow = AllowList.of([server.url("")], [tmp_path / "origin"])
    surroundings = options.pop("surroundings", lambda stop: World().surroundings())
    return Sources(allow, Spool(tmp_path / "data"), Limits(attempts_max=2), surroundings=surroundings, **options)


async def registered(sources: Sources, url: str, name: str = "sql") -> str:
    """Register an origin for good and return its digest."""
    async with sources.arrival(name, url) as arrival:
        digest = arrival.registration.adapter.digest
    sources.trust(digest)
    return digest


def incoming(sources: Sources) -> list[Path]:
    return list((sources.spool.directory / "incoming").iterdir())


async def test_a_local_folder_is_not_copied(sources: Sources, tmp_path: Path) -> None:
    """It stays where it is, and the spool has nothing of it."""
    async with sources.arrival("sql", str(tmp_path / "origin")) as arrival:
        assert arrival.origin == str(tmp_path / "origin")
    assert sources.spool.digests() == []
    assert await sources.locate(arrival.origin, "x") == tmp_path / "origin"


async def test_an_arrival_is_kept_if_somebody_wants_it(sources: Sources, server: FaultyServer) -> None:
    """While the registration goes on its source stays; after that it is doubted until a name stands for it."""
    async with sources.arrival("sql", server.url("sql?sig=s3cret")) as arrival:
        digest = arrival.registration.adapter.digest
        assert arrival.origin == server.url("sql")
        sources.doubt(digest)
        sources.forget(digest)
        assert sources.spool.digests() == [digest]
    assert list(sources.doubted) == [digest]
    sources.forget(digest)
    assert sources.spool.digests() == []
    await until(lambda: not incoming(sources))


async def test_64_registrations_of_one_url_are_one_download(sources: Sources, server: FaultyServer) -> None:
    """Under one name or several; each gets its own answer and the last to leave tidies up."""
    digests = await asyncio.gather(*(registered(sources, server.url("sql"), f"sql-{n % 3}") for n in range(64)))
    assert len(set(digests)) == 1
    assert server.count(WEIGHTS) == 1
    assert sources.spool.digests() == [digests[0]]
    await until(lambda: not incoming(sources))


async def test_registrations_that_fail_leave_nothing(sources: Sources, server: FaultyServer) -> None:
    """Files that are no adapter, an origin that is not allowed, one that does not answer; all name the adapter."""
    server.files[f"/sql/{WEIGHTS}"] = b"x" * 100
    for url, reason in (
        (server.url("sql"), Reason.ADAPTER_MALFORMED),
        (server.url("none"), Reason.ORIGIN_UNREADABLE),
        ("https://elsewhere.example/sql", Reason.ORIGIN_NOT_ALLOWED),
        ("push://" + "a" * 64, Reason.ORIGIN_NOT_ALLOWED),
    ):
        with pytest.raises(Invalid) as caught:
            await registered(sources, url)
        assert caught.value.reason is reason
        assert "sql" in caught.value.message
        assert caught.value.details["adapter"] == "sql"
    await until(lambda: not incoming(sources))
    assert sources.spool.digests() == []


async def test_the_last_to_leave_stops_a_download(server: FaultyServer, tmp_path: Path) -> None:
    """As long as one registration waits it goes on; when none does its next wait ends it, and nothing is left."""
    server.faults[WEIGHTS] = [Fault(stall=True)]
    stops: list[threading.Event] = []

    def surroundings(stop: threading.Event) -> Surroundings:
        stops.append(stop)
        return surroundings_of(stop)

    sources = sources_at(server, tmp_path, surroundings=surroundings)
    first, second = (asyncio.create_task(registered(sources, server.url("sql"))) for _ in range(2))
    await until(lambda: server.count(WEIGHTS) == 1)
    first.cancel()
    await asyncio.wait([first])
    assert not stops[0].is_set()
    second.cancel()
    await asyncio.wait([second])
    assert stops[0].is_set()
    server.released.set()
    await until(lambda: not incoming(sources))
    assert server.count(WEIGHTS) == 1
    sources.close()


async def test_downloads_take_turns(server: FaultyServer, tmp_path: Path) -> None:
    """Not more than are allowed at a time; the others wait."""
    server.always[WEIGHTS] = Fault(stall=True)
    sources = sources_at(server, tmp_path, downloads_max=2)
    for number in range(3):
        server.serve(f"sql{number}", tmp_path / "origin")
    tasks = [asyncio.create_task(registered(sources, server.url(f"sql{number}"))) for number in range(3)]
    await until(lambda: server.count(WEIGHTS) == 2)
    server.always.clear()
    server.released.set()
    await asyncio.gather(*tasks)
    assert not any(asked.path.startswith("/sql2/") for asked in server.asked[:4])
    sources.close()


async def test_what_is_lost_is_fetched_again_once(sources: Sources, server: FaultyServer) -> None:
    """Whoever misses it, for whatever layout, waits for one download."""
    digest = await registered(sources, server.url("sql"))
    assert await sources.locate(server.url("sql"), digest) == sources.spool.folder(digest)
    assert server.count(WEIGHTS) == 1
    shutil.rmtree(sources.spool.folder(digest))
    found = await asyncio.gather(*(sources.locate(server.url("sql"), digest) for _ in range(64)))
    assert set(found) == {sources.spool.folder(digest)}
    assert digest_of_folder(found[0]) == digest
    assert server.count(WEIGHTS) == 2


async def test_an_origin_that_holds_other_content_by_now(
    sources: Sources, server: FaultyServer, tmp_path: Path
) -> None:
    """It is refused with both digests and the way out, and nothing of it stays."""
    digest = await registered(sources, server.url("sql"))
    sources.spool.discard(digest)
    server.serve("sql", write_adapter(tmp_path / "other", seed=1))
    with pytest.raises(Invalid, match=f"now holds other content .*{digest[:12]}.*register it as a new version"):
        await sources.locate(server.url("sql"), digest)
    assert sources.spool.digests() == []
    await until(lambda: not incoming(sources))


async def test_a_damaged_copy_is_dropped(sources: Sources, server: FaultyServer, tmp_path: Path) -> None:
    """A sound one stays; a local folder is not ours to drop."""
    digest = await registered(sources, server.url("sql"))
    weights = sources.spool.folder(digest) / WEIGHTS
    assert await sources.mend(server.url("sql"), digest)
    assert sources.spool.holds(digest)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert await sources.mend(server.url("sql"), digest)
    assert not sources.spool.holds(digest)
    assert not await sources.mend(str(tmp_path / "origin"), digest)


async def test_a_copy_in_the_spool_comes_first(sources: Sources, server: FaultyServer, tmp_path: Path) -> None:
    """Content that also came from a URL is there even if the local folder it is registered from goes."""
    digest = await registered(sources, server.url("sql"))
    assert await sources.locate(str(tmp_path / "gone"), digest) == sources.spool.folder(digest)


async def test_what_was_pushed_has_no_origin(sources: Sources, tmp_path: Path) -> None:
    """A pushed folder is adopted; once it is gone only another push helps."""
    with sources.incoming() as folder:
        write_adapter(folder)
        async with sources.pushed("sql", folder) as arrival:
            digest = arrival.registration.adapter.digest
            assert arrival.origin == f"push://{digest}"
    assert await sources.locate(arrival.origin, digest) == sources.spool.folder(digest)
    sources.spool.discard(digest)
    with pytest.raises(Invalid, match="push it again"):
        await sources.locate(arrival.origin, digest)


async def test_leaving_while_a_server_is_silent(server: FaultyServer, tmp_path: Path) -> None:
    """Whoever waits is told at once, whatever the thread is doing."""
    server.always[WEIGHTS] = Fault(stall=True)
    sources = sources_at(server, tmp_path, surroundings=surroundings_of)
    registering = asyncio.create_task(registered(sources, server.url("sql")))
    missing = asyncio.create_task(sources.locate(server.url("sql"), "a" * 64))
    await until(lambda: server.count(WEIGHTS) == 2)
    sources.close()
    for task in (registering, missing):
        with pytest.raises(Refused, match="going down"):
            await task
    with pytest.raises(Refused, match="going down"):
        await sources.locate(server.url("sql"), "b" * 64)
    server.released.set()
    await until(lambda: not any(thread.name == "download" for thread in threading.enumerate()))


async def test_what_is_there_at_start_is_doubted(server: FaultyServer, tmp_path: Path) -> None:
    """Names that stand for it have to be announced first."""
    first = sources_at(server, tmp_path)
    digest = await registered(first, server.url("sql"))
    first.close()
    again = sources_at(server, tmp_path)
    assert list(again.doubted) == [digest]
    again.close()
