"""`sidecar state backup` and `restore`: all shared state in a file, and back into a file or a Redis."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import stat
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from time import time
from typing import Any

import pytest
from redis.asyncio import Redis

from sidecar.access.entries import CODEC, Key, LimitEntry
from sidecar.config.access import Limit
from sidecar.config.redis_address import RedisLocation, parse_address
from sidecar.ownership.effects import SendBeat
from sidecar.ownership.facts import Member
from sidecar.state.records import Record, added, refreshed
from sidecar.state.redis.contents import UNFINISHED
from sidecar.state.redis.link import Link
from sidecar.state.redis.members import RedisMembers
from sidecar.state.registry import REGISTRY_FILE, SqliteRegistry, lock_data_directory
from tests.kit.access_stores import access_store, key_book, new_key
from tests.kit.cli_runs import Ended, runner
from tests.kit.emulated import running_engine
from tests.kit.redis_servers import Server, running
from tests.kit.registries import adapter, link_to, record, shared_registry
from tests.kit.serving import serving, write_adapters

LIMIT = LimitEntry(Limit(tenant="acme", tokens_per_minute=20_000))
UNREAD = '{"of": "a release to come"}'


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with running(tmp_path / "server") as server:
        yield server


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    return runner(capfd)


async def state(command: Callable[..., Ended], *arguments: object) -> Ended:
    return await asyncio.to_thread(command, "state", *map(str, arguments))


def with_redis(folder: Path, server: Server) -> Path:
    path = folder / "sidecar.yaml"
    path.write_text(f"state: {{url: {server.url}}}\n")
    return path


async def a_place(data: Path) -> tuple[list[Record], list[Key], str]:
    """Write a data directory with names, keys, a limit, usage, and an entry of a release to come."""
    async with access_store(data) as store:
        (secret, key), (_, revoked) = new_key("acme", roles=("viewer",)), new_key("other")
        for entry in (key, revoked, LIMIT):
            await store.put(entry)
        await store.revoke(revoked.id)
        keys = store.keys()
    with closing(sqlite3.connect(data / "access" / "access.sqlite")) as database, database:
        database.execute("INSERT INTO entries VALUES ('grant/x', ?)", (UNREAD,))
    lock_data_directory(data).close()
    registry = SqliteRegistry(data / REGISTRY_FILE)
    grown, _ = added(record("sql"), "sql", adapter(2), "s3://b/2", now=1e9, labels=(("team", "ä"),))
    await registry.put(record("sql"), None)
    await registry.put(refreshed(grown, 2), record("sql"))
    await registry.put(record("gone"), None)
    await registry.delete("gone", record("gone"))
    records = registry.all()
    await registry.close()
    with closing(sqlite3.connect(data / "access" / "usage.sqlite")) as database, database:
        database.execute("CREATE TABLE used (tokens)")
        database.execute("INSERT INTO used VALUES (12345)")
    return records, keys, secret


def tokens_used(data: Path) -> list[Any]:
    with closing(sqlite3.connect(data / "access" / "usage.sqlite")) as database:
        return database.execute("SELECT tokens FROM used").fetchall()


async def check_file(data: Path, records: list[Record], keys: list[Key], secret: str) -> None:
    lock_data_directory(data).close()
    registry = SqliteRegistry(data / REGISTRY_FILE)
    assert registry.all() == records
    assert [(change.number, change.name) for change in await registry.changes_after(2)] == [(3, "gone"), (4, "gone")]
    await registry.close()
    async with access_store(data) as store, key_book(store) as book:
        assert store.keys() == keys
        assert store.limits() == [LIMIT.limit]
        assert book.find(secret, 0.0).tenant == "acme"
        assert store.set_aside.keys() == {"grant/x"}


async def test_from_a_directory_into_another_one_and_into_a_redis_and_back(
    server: Server, tmp_path: Path, command: Callable[..., Ended]
) -> None:
    records, keys, secret = await a_place(tmp_path / "data")
    file = tmp_path / "backup.zip"
    ended = await state(command, "backup", file, "--data-directory", tmp_path / "data")
    assert ended.code == 0, ended.err
    assert f"from {tmp_path / 'data'} with 1 adapter, 2 keys, 1 limit, with usage" in ended.out
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    ended = await state(command, "restore", file, "--data-directory", tmp_path / "other", "--json")
    assert ended.code == 0, ended.err
    assert {name: ended.json()[name] for name in ("adapters", "keys", "limits")} == {
        "adapters": 1, "keys": 2, "limits": 1,
    }  # fmt: skip
    await check_file(tmp_path / "other", records, keys, secret)
    assert tokens_used(tmp_path / "other") == [(12345,)]

    config = with_redis(tmp_path, server)
    ended = await state(command, "restore", file, "--config", config, "--data-directory", tmp_path / "third")
    assert ended.code == 0, ended.err
    assert tokens_used(tmp_path / "third") == [(12345,)]
    assert not (tmp_path / "third" / REGISTRY_FILE).exists()
    async with shared_registry(server.url) as registry, access_store(None, server.url) as store:
        assert registry.all() == records
        assert (store.keys(), store.limits()) == (keys, [LIMIT.limit])
        assert store.set_aside.keys() == {"grant/x"}
        _, another = new_key()
        await store.put(another)
        await registry.put(record("new"), None)
        # Replicas that work on it are no obstacle.
        ended = await state(command, "backup", tmp_path / "of-redis.zip", "--config", config)
        assert ended.code == 0, ended.err
    ended = await state(command, "restore", tmp_path / "of-redis.zip", "--data-directory", tmp_path / "back")
    assert ended.out.startswith(f"restored into {tmp_path / 'back'}: 2 adapters, 3 keys, 1 limit, without usage\n")
    async with access_store(tmp_path / "back") as store:
        assert sorted(store.keys(), key=lambda key: key.id) == sorted([*keys, another], key=lambda key: key.id)
        assert store.set_aside.keys() == {"grant/x"}


async def test_what_is_there_is_replaced_only_by_force(
    server: Server, tmp_path: Path, command: Callable[..., Ended]
) -> None:
    records, keys, secret = await a_place(tmp_path / "data")
    file, config = tmp_path / "backup.zip", with_redis(tmp_path, server)
    assert (await state(command, "backup", file, "--data-directory", tmp_path / "data")).code == 0
    before = file.read_bytes()
    ended = await state(command, "backup", file, "--data-directory", tmp_path / "data")
    assert (ended.code, file.read_bytes()) == (2, before)
    assert "exists already" in ended.err
    assert (await state(command, "backup", file, "--data-directory", tmp_path / "data", "--force")).code == 0
    async with access_store(tmp_path / "data") as store:
        await store.put(new_key()[1])
        await store.remove(LIMIT.name)
    ended = await state(command, "restore", file, "--data-directory", tmp_path / "data")
    assert ended.code == 1
    assert "there is state already; --force puts the backup in its place" in ended.err
    async with access_store(tmp_path / "data") as store:
        assert len(store.keys()) == 3
    assert (await state(command, "restore", file, "--data-directory", tmp_path / "data", "--force")).code == 0
    await check_file(tmp_path / "data", records, keys, secret)
    async with access_store(None, server.url) as store:
        await store.put(new_key()[1])
    ended = await state(command, "restore", file, "--config", config)
    assert ended.code == 1
    assert "there is state already" in ended.err
    async with shared_registry(server.url) as registry:
        assert registry.all() == []
    assert (await state(command, "restore", file, "--config", config, "--force")).code == 0
    async with access_store(None, server.url) as store:
        assert store.keys() == keys


async def two_keys(place: Callable[[], Any]) -> tuple[Key, Key]:
    """Put two keys into a store."""
    (_, kept), (_, leaked) = new_key("acme"), new_key("other")
    async with place() as store:
        await store.put(kept)
        await store.put(leaked)
    return kept, leaked


async def states(place: Callable[[], Any]) -> dict[str, str]:
    async with place() as store:
        return {key.id: key.state(0.0) for key in store.keys()}  # noqa: SIM118 — no dict


@pytest.mark.parametrize("is_shared", [False, True], ids=["sqlite", "redis"])
async def test_a_key_that_was_revoked_after_the_backup_stays_revoked(
    server: Server, tmp_path: Path, command: Callable[..., Ended], is_shared: bool
) -> None:
    def place() -> Any:
        return access_store(None, server.url) if is_shared else access_store(tmp_path / "data")

    where = ("--config", with_redis(tmp_path, server)) if is_shared else ("--data-directory", tmp_path / "data")
    kept, leaked = await two_keys(place)
    file, later = tmp_path / "backup.zip", tmp_path / "later.zip"
    assert (await state(command, "backup", file, *where)).code == 0
    _, new = new_key("new")
    async with place() as store:
        await store.put(new)
    assert (await state(command, "backup", later, *where)).code == 0
    async with place() as store:
        await store.revoke(leaked.id)
        await store.revoke(new.id)

    ended = await state(command, "restore", file, *where, "--force", "--json")
    assert (ended.json()["brought_back"], ended.json()["stay_revoked"]) == ([], [{"id": leaked.id, "tenant": "other"}])
    assert await states(place) == {kept.id: "active", leaked.id: "revoked", new.id: "revoked"}

    ended = await state(command, "restore", later, *where, "--force")  # the restored state knows both
    assert f"2 keys revoked since, and still revoked:\n{listed(leaked, new)}" in ended.out
    assert "good again" not in ended.out
    assert await states(place) == {kept.id: "active", leaked.id: "revoked", new.id: "revoked"}
    async with place() as store:
        number = store._registry.last_change
        await store.put(new_key()[1])
        assert store._registry.last_change == number + 1


def listed(*keys: Key) -> str:
    ordered = sorted(keys, key=lambda key: key.id)
    return "".join(f"  {key.id}  tenant {key.tenant}\n" for key in ordered)


async def test_a_new_place_says_which_keys_are_good_again(
    server: Server, tmp_path: Path, command: Callable[..., Ended]
) -> None:
    kept, leaked = await two_keys(lambda: access_store(tmp_path / "data"))
    file, config = tmp_path / "backup.zip", with_redis(tmp_path, server)
    assert (await state(command, "backup", file, "--data-directory", tmp_path / "data")).code == 0
    rewritten(file, tmp_path / "old.zip", lambda name, data: manifest_with(made_at=time() - 3 * 86_400)(name, data))
    async with access_store(tmp_path / "data") as store:
        await store.revoke(leaked.id)

    ended = await state(command, "restore", tmp_path / "old.zip", "--data-directory", tmp_path / "new")
    assert "UTC, 3 days ago\n" in ended.out
    assert (
        "2 keys good again, of which nothing here says whether they were revoked since:\n"
        f"{listed(kept, leaked)}revoke those that were" in ended.out
    )
    ended = await state(command, "restore", file, "--data-directory", tmp_path / "without", "--no-keys")
    assert ", 0 keys, " in ended.out
    assert "good again" not in ended.out
    assert await states(lambda: access_store(tmp_path / "without")) == {}

    # The Redis is new, but the data directory beside it knows.
    ended = await state(command, "restore", file, "--config", config, "--data-directory", tmp_path / "data")
    assert f"1 key revoked since, and still revoked:\n{listed(leaked)}" in ended.out
    assert f"1 key good again, of which nothing here says whether they were revoked since:\n{listed(kept)}" in ended.out
    assert await states(lambda: access_store(None, server.url)) == {kept.id: "active", leaked.id: "revoked"}


async def test_a_copy_of_a_redis_that_was_lost_knows_what_was_revoked(
    server: Server, tmp_path: Path, command: Callable[..., Ended]
) -> None:
    kept, leaked = await two_keys(lambda: access_store(None, server.url))
    file, config = tmp_path / "backup.zip", with_redis(tmp_path, server)
    assert (await state(command, "backup", file, "--config", config)).code == 0
    async with access_store(tmp_path / "data", server.url) as store:
        await store.revoke(leaked.id)
    async with Redis.from_url(server.url) as client:
        await client.flushall()
    ended = await state(command, "restore", file, "--config", config, "--data-directory", tmp_path / "data")
    assert f"1 key revoked since, and still revoked:\n{listed(leaked)}" in ended.out
    assert await states(lambda: access_store(None, server.url)) == {kept.id: "active", leaked.id: "revoked"}


@pytest.mark.parametrize("damaged", [False, True])
async def test_an_entry_of_a_later_release_is_not_replaced(
    tmp_path: Path, command: Callable[..., Ended], damaged: bool
) -> None:
    """It may say that the key is revoked. The key is refused before the restore, so it is after."""

    def place() -> Any:
        return access_store(tmp_path / "data")

    def entries(statement: str, *values: str) -> list[tuple[str]]:
        with closing(sqlite3.connect(tmp_path / "data" / "access" / "access.sqlite")) as database, database:
            return database.execute(statement, values).fetchall()

    kept, leaked = await two_keys(place)
    file, where = tmp_path / "backup.zip", ("--data-directory", tmp_path / "data")
    assert (await state(command, "backup", file, *where)).code == 0
    async with place() as store:
        await store.revoke(leaked.id)
    one = "SELECT record FROM entries WHERE name = ?"
    ((text,),) = entries(one, leaked.name)
    text = text[:-1] if damaged else text.replace('"tenant"', '"revoked_by":"somebody","tenant"')
    entries("UPDATE entries SET record = ? WHERE name = ?", text, leaked.name)
    for options in (("--force",), ("--force", "--no-keys"), ("--force", "--json")):
        ended = await state(command, "restore", file, *where, *options)
        assert ended.code == 0
        if options == ("--force",):
            assert "1 key whose entries there this release cannot read: they may be revoked" in ended.out
            assert f"and are refused:\n  {leaked.id}\n" in ended.out
        assert "good again" not in ended.out
        assert await states(place) == {kept.id: "active"}
        assert entries(one, leaked.name) == [(text,)]
    assert (ended.json()["stay_unread"], ended.json()["stay_revoked"]) == ([leaked.id], [])


async def test_a_restore_that_was_cut_off_is_repeated(
    server: Server, tmp_path: Path, command: Callable[..., Ended]
) -> None:
    _, leaked = await two_keys(lambda: access_store(None, server.url))
    file, config = tmp_path / "backup.zip", with_redis(tmp_path, server)
    assert (await state(command, "backup", file, "--config", config)).code == 0
    async with access_store(None, server.url) as store:
        await store.revoke(leaked.id)
    link = Link(RedisLocation(parse_address(server.url)), CODEC)
    await link.set_meta(schema=UNFINISHED)
    await link.close()
    assert (await state(command, "restore", file, "--config", config, "--force")).code == 0
    assert (await states(lambda: access_store(None, server.url)))[leaked.id] == "revoked"


async def test_nothing_is_restored_under_a_sidecar_that_runs(
    server: Server, tmp_path: Path, command: Callable[..., Ended]
) -> None:
    await a_place(tmp_path / "data")
    file, config = tmp_path / "backup.zip", with_redis(tmp_path, server)
    with lock_data_directory(tmp_path / "data"):
        assert (await state(command, "backup", file, "--data-directory", tmp_path / "data")).code == 0
        ended = await state(command, "restore", file, "--data-directory", tmp_path / "data", "--force")
        assert ended.code == 3
    link = link_to(server.url)
    await RedisMembers(link).beat(SendBeat(1, Member("one", "one")), "", 0)
    ended = await state(command, "restore", file, "--config", config, "--force")
    assert ended.code == 1
    assert f"one use Redis at {server.address}; stop them first" in ended.err
    await link.close()


async def test_a_backup_of_a_sidecar_that_runs(tmp_path: Path, command: Callable[..., Ended]) -> None:
    write_adapters(tmp_path / "adapters", 2)
    data = tmp_path / "data"
    async with (
        running_engine(compute="none", shape="tiny") as engine,
        serving([engine], tmp_path / "adapters", data_directory=str(data)) as served,
    ):
        await served.ask("a00")
        ended = await state(command, "backup", tmp_path / "backup.zip", "--data-directory", data)
        assert ended.code == 0, ended.err
        assert "with 2 adapters, 0 keys, 0 limits, with usage" in ended.out
        records = served.sidecar.registry.all()
    assert (await state(command, "restore", tmp_path / "backup.zip", "--data-directory", tmp_path / "other")).code == 0
    lock_data_directory(tmp_path / "other").close()
    registry = SqliteRegistry(tmp_path / "other" / REGISTRY_FILE)
    assert registry.all() == records
    await registry.close()


async def test_a_backup_of_a_redis_that_is_written_to_is_as_of_one_moment(
    server: Server, tmp_path: Path, command: Callable[..., Ended]
) -> None:
    config = with_redis(tmp_path, server)
    async with shared_registry(server.url) as registry:
        await registry.put(record("n000"), None)

        async def write() -> None:
            for number in range(1, 200):
                await registry.put(record(f"n{number:03}"), None)

        writing = asyncio.create_task(write())
        ended = await state(command, "backup", tmp_path / "backup.zip", "--config", config)
        await writing
    assert ended.code == 0, ended.err
    with zipfile.ZipFile(tmp_path / "backup.zip") as archive:
        archive.extract("names.sqlite", tmp_path)
    with closing(sqlite3.connect(tmp_path / "names.sqlite")) as database:
        names = [name for (name,) in database.execute("SELECT name FROM adapters ORDER BY name")]
        changes = database.execute("SELECT number, name FROM changes ORDER BY number").fetchall()
    assert names == [f"n{number:03}" for number in range(len(names))]
    assert changes == [(number + 1, name) for number, name in enumerate(names)]


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes]) -> None:
    with zipfile.ZipFile(source) as there, zipfile.ZipFile(target, "w") as here:
        for name in there.namelist():
            here.writestr(name, change(name, there.read(name)))


def manifest_with(**fields: Any) -> Callable[[str, bytes], bytes]:
    return lambda name, data: json.dumps(json.loads(data) | fields).encode() if name == "manifest.json" else data


async def test_a_damaged_backup_changes_nothing(tmp_path: Path, command: Callable[..., Ended]) -> None:
    await a_place(tmp_path / "data")
    file, bad = tmp_path / "backup.zip", tmp_path / "bad.zip"
    assert (await state(command, "backup", file, "--data-directory", tmp_path / "data")).code == 0
    with zipfile.ZipFile(file) as archive:
        listed = json.loads(archive.read("manifest.json"))["parts"]
        for part in listed:
            data = archive.read(part["file"])
            assert (hashlib.sha256(data).hexdigest(), len(data)) == (part["sha256"], part["bytes"])
    for change, says in (
        (lambda name, data: data.replace(b"acme", b"evil"), "access.sqlite is not as it was written"),
        (manifest_with(format=2), "of a newer release"),
        (manifest_with(parts=[{"file": "../../x", "bytes": 1}]), "is no sound backup"),
        (None, "is no sound backup"),
    ):
        if change is not None:
            rewritten(file, bad, change)
        else:
            bad.write_bytes(file.read_bytes()[:-100])
        ended = await state(command, "restore", bad, "--data-directory", tmp_path / "other")
        assert ended.code > 0
        assert says in ended.err
        assert not (tmp_path / "other" / REGISTRY_FILE).exists()
    ended = await state(command, "restore", tmp_path / "none.zip", "--data-directory", tmp_path / "other")
    assert "No such file" in ended.err
    for arguments in (("backup", tmp_path / "x.zip"), ("restore", file)):
        ended = await state(command, *arguments)
        assert ended.code == 2
        assert "--config" in ended.err
    ended = await state(command, "backup", tmp_path / "x.zip", "--data-directory", tmp_path / "nowhere")
    assert ended.code == 2
    assert f"there is no state in {tmp_path / 'nowhere'}" in ended.err
