"""Keys and limits that several replicas share in a real Redis, which loses data, goes away and comes back."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sqlite3
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from sidecar.access.backup import StateLocation, backup, restore
from sidecar.access.entries import CODEC, AccessEntry, LimitEntry
from sidecar.access.keys import KeyBook
from sidecar.access.store import COPY, FOLDER, AccessStore
from sidecar.config.access import Limit
from sidecar.config.redis_address import RedisLocation, parse_address
from sidecar.errors import Misused, Reason, Refused
from sidecar.ownership.effects import SendBeat
from sidecar.ownership.facts import Member
from sidecar.state.redis.kept import Kept, KeptFile
from sidecar.state.redis.link import Link
from sidecar.state.redis.members import RedisMembers
from sidecar.state.redis.registry import RedisRegistry
from sidecar.tasks import ended
from tests.kit.access_stores import STALE_MAX_S, access_store, key_book, new_key
from tests.kit.redis_servers import Server, cluster, cuttable, running, watched
from tests.kit.registries import link_to, record, shared_registry
from tests.kit.serving import until


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with running(tmp_path / "server") as server:
        yield server


class Replica:
    """A store with its book of keys, and the folder of its data."""

    def __init__(self, store: AccessStore, book: KeyBook) -> None:
        self.store, self.book = store, book

    def admits(self, secret: str, after_s: float = 0.0) -> bool:
        """Tell whether a key is good, so many seconds after Redis' last answer."""
        try:
            self.book.find(secret, (self.store.answered_at or 0.0) + after_s)
        except (Misused, Refused):
            return False
        return True


async def replica(
    stack: AsyncExitStack, url: str, data: Path | None = None, member: str = "", keys_file: Path | None = None
) -> Replica:
    store = await stack.enter_async_context(access_store(data, url, member))
    return Replica(store, await stack.enter_async_context(key_book(store, keys_file)))


def copy_in(data: Path) -> Path:
    return data / FOLDER / COPY


async def is_copied(data: Path, *names: str) -> None:
    """Wait until the copy on disk has these entries."""
    await until(lambda: copy_in(data).exists() and all(name.encode() in copy_in(data).read_bytes() for name in names))


async def until_away(*replicas: Replica) -> None:
    await until(lambda: all(each.store.away_since is not None for each in replicas))


async def until_back(*replicas: Replica) -> None:
    await until(lambda: all(each.store.away_since is None for each in replicas))


async def test_a_call_that_revokes_ends_when_every_live_replica_refuses(server: Server) -> None:
    async with AsyncExitStack() as stack:
        link = link_to(server.url)
        stack.push_async_callback(link.close)
        one = await replica(stack, server.url, member="one")
        two = await replica(stack, server.url, member="two")
        for name in ("one", "two"):
            await RedisMembers(link).beat(SendBeat(1, Member(name, name)), "", 0)
        for _ in range(50):
            secret, key = new_key()
            await one.store.put(key)
            held = two.book.find(secret, 0.0)
            await one.store.revoke(key.id)
            with pytest.raises(Misused, match="was revoked"):
                two.book.find(secret, 0.0)
            with pytest.raises(Misused, match="was revoked"):
                two.book.check(held, 0.0)


async def test_a_call_that_revokes_says_who_has_not_heard_of_it(server: Server) -> None:
    """A live replica that is cut off is named, and the key is revoked; the call can be made again."""
    async with AsyncExitStack() as stack:
        link = link_to(server.url)
        stack.push_async_callback(link.close)
        proxy = await stack.enter_async_context(cuttable(server))
        store = AccessStore(None, RedisLocation(parse_address(server.url)), "one", member_ttl_s=3.0)
        await store.start()
        stack.push_async_callback(store.close)
        book = await stack.enter_async_context(key_book(store))
        two = await replica(stack, proxy.url, member="two")
        secret, key = new_key()
        await store.put(key)
        await until(lambda: two.admits(secret))
        await proxy.cut()

        async def beat() -> None:
            while True:
                await RedisMembers(link).beat(SendBeat(1, Member("two", "two")), "", 0)
                await asyncio.sleep(0.05)

        await RedisMembers(link).beat(SendBeat(1, Member("two", "two")), "", 0)
        beating = asyncio.create_task(beat())
        with pytest.raises(Refused, match=r"it is stored as change .*, but two did not read it yet") as refused:
            await book.revoke(key.id)
        assert refused.value.reason is Reason.STATE_UNAVAILABLE
        assert refused.value.message.startswith(f"the key {key.id} is revoked, and a replica that has not heard of it")
        assert store.keys()[0].revoked_at is not None
        await proxy.mend()
        assert (await store.revoke(key.id)).revoked_at == store.keys()[0].revoked_at
        assert not two.admits(secret)
        await ended(beating)


@pytest.mark.parametrize("how", ["flushed", "killed"])
async def test_a_redis_that_lost_all_gets_back_keys_limits_and_revocations(server: Server, how: str) -> None:
    limit = LimitEntry(Limit(tenant="acme", tokens_per_minute=20_000))
    async with AsyncExitStack() as stack:
        one, two = [await replica(stack, server.url) for _ in range(2)]
        (good, kept), (bad, revoked) = new_key(), new_key()
        for key in (kept, revoked):
            await one.store.put(key)
        await one.store.put(limit)
        await one.store.revoke(revoked.id)
        await until(lambda: two.store.keys() == one.store.keys() and two.store.limits() == [limit.limit])
        if how == "flushed":
            async with server.client() as client:
                await client.flushall()
        else:
            await server.kill()
            await until_away(one, two)
            await server.start()
            await until_back(one, two)
        another, key = new_key("other")
        await until_written(one.store, key)
        await until(lambda: two.admits(another))
        late = await replica(stack, server.url)
        for each in (one, two, late):
            assert (each.admits(good), each.admits(bad), each.admits(another)) == (True, False, True)
            assert each.store.limits() == [limit.limit]


async def until_written(store: AccessStore, entry: object) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                return await store.put(entry)  # type: ignore[arg-type]
            except Refused:
                await asyncio.sleep(0.02)


async def test_the_registry_of_names_beside_it_is_another_one(server: Server) -> None:
    async with AsyncExitStack() as stack:
        names = await stack.enter_async_context(shared_registry(server.url))
        one = await replica(stack, server.url)
        _, key = new_key()
        await one.store.put(key)
        await names.put(record("a"), None)
        await names.put(record("b"), None)
        assert [found.name for found in names.all()] == ["a", "b"]
        assert one.store.keys() == [key]
        async with server.client() as client:
            found = {name.removeprefix("{lora-sidecar}:") for name in await client.keys()}
        assert {"meta", "adapters", "changes", "access-meta", "access-entries", "access-changes"} <= found


async def test_known_keys_survive_a_restart_without_redis_for_an_hour_after_its_last_answer(
    server: Server, tmp_path: Path
) -> None:
    data, path = tmp_path / "data", tmp_path / "keys.yaml"
    path.write_text("- {tenant: other, key: a key of the file}\n")
    limit = LimitEntry(Limit(tenant="*", requests_per_minute=5))
    (good, kept), (bad, revoked) = new_key(), new_key()
    async with AsyncExitStack() as stack:
        one = await replica(stack, server.url, data)
        for key in (kept, revoked):
            await one.store.put(key)
        await one.store.put(limit)
        await one.store.revoke(revoked.id)
    await server.kill()
    answered = one.store.answered_at
    assert answered is not None
    assert stat.S_IMODE(copy_in(data).stat().st_mode) == 0o600
    for _ in range(2):  # the second restart does not begin a new hour
        async with AsyncExitStack() as stack:
            again = await replica(stack, server.url, data, keys_file=path)
            assert again.store.answered_at == answered
            assert again.store.away_since == answered
            held = again.book.find(good, answered + STALE_MAX_S)
            assert not again.admits(bad)
            for ask in (partial(again.book.find, good), partial(again.book.check, held)):
                with pytest.raises(
                    Refused, match=r"Redis of the keys has not answered since .* good for 3600 s"
                ) as said:
                    ask(answered + STALE_MAX_S + 0.1)
                assert said.value.reason is Reason.STATE_UNAVAILABLE
            assert again.book.find("a key of the file", answered + 10 * STALE_MAX_S).tenant == "other"
            assert again.store.limits() == [limit.limit]
            with pytest.raises(Refused, match="changing a key or a limit needs Redis at"):
                await again.store.put(new_key()[1])


async def test_a_replica_that_started_without_redis_follows_it_when_it_is_back(server: Server, tmp_path: Path) -> None:
    secrets = []
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(cuttable(server))
        other = await replica(stack, server.url)
        async with AsyncExitStack() as first:
            one = await replica(first, proxy.url, tmp_path / "data")
            for _ in range(3):
                secret, key = new_key()
                await one.store.put(key)
                secrets.append((secret, key))
        await proxy.cut()
        again = await replica(stack, proxy.url, tmp_path / "data")
        await other.store.revoke(secrets[0][1].id)
        await other.store.remove(secrets[1][1].name)
        made, key = new_key()
        await other.store.put(key)
        assert [again.admits(secret) for secret, _ in secrets] == [True, True, True]
        await proxy.mend()
        await until(lambda: again.admits(made))
        assert [again.admits(secret) for secret, _ in secrets] == [False, False, True]
        assert again.store.keys() == other.store.keys()


async def test_an_emptied_redis_is_filled_from_a_copy_on_disk(server: Server, tmp_path: Path) -> None:
    """All replicas restarted while Redis was away, and it came back empty."""
    (good, kept), (bad, revoked) = new_key(), new_key()
    async with AsyncExitStack() as stack:
        one = await replica(stack, server.url, tmp_path / "data")
        for key in (kept, revoked):
            await one.store.put(key)
        await one.store.revoke(revoked.id)
    await server.kill()
    async with AsyncExitStack() as stack:
        again = await replica(stack, server.url, tmp_path / "data")
        await server.start()
        await until_back(again)
        late = await replica(stack, server.url)
        await until(lambda: len(late.store.keys()) == 2)
        assert (late.admits(good), late.admits(bad)) == (True, False)


WRITER = """
import asyncio, sys
from pathlib import Path
from tests.kit.access_stores import access_store, new_key
async def main(data, url):
    async with access_store(Path(data), url) as store:
        for _ in range(2):
            secret, key = new_key()
            await store.put(key)
            print(secret, key.id, flush=True)
            await asyncio.to_thread(sys.stdin.readline)
asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_process_killed_between_the_write_and_the_copy(server: Server, tmp_path: Path) -> None:
    """Redis has the key. The copy on disk is the former one, whole; without Redis the key is unknown."""
    data = tmp_path / "data"
    writer = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WRITER, str(data), server.url, stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, cwd=Path.cwd(), env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert writer.stdout is not None
    assert writer.stdin is not None
    async with asyncio.timeout(60):
        first, key_id = (await writer.stdout.readline()).decode().split()
    await is_copied(data, key_id)
    with closing(sqlite3.connect(copy_in(data), isolation_level=None)) as held:
        held.execute("BEGIN EXCLUSIVE")  # whoever writes the copy waits
        writer.stdin.write(b"\n")
        async with asyncio.timeout(60):
            second, _ = (await writer.stdout.readline()).decode().split()
        writer.send_signal(signal.SIGKILL)
        await writer.wait()
    kept = copy_in(data).read_bytes()
    async with AsyncExitStack() as stack:
        again = await replica(stack, server.url, data)
        assert again.admits(first)
        assert again.admits(second)
    copy_in(data).write_bytes(kept)
    await server.kill()
    async with AsyncExitStack() as stack:
        again = await replica(stack, server.url, data)
        assert again.admits(first)
        with pytest.raises(Misused, match="not known"):
            again.book.find(second, 0.0)


async def test_a_copy_that_is_damaged_old_or_of_another_redis_is_not_used(server: Server, tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with AsyncExitStack() as stack:
        one = await replica(stack, server.url, data)
        _, key = new_key()
        await one.store.put(key)
    path, link = copy_in(data), Link(RedisLocation(parse_address(server.url)), CODEC)
    await link.close()

    def read(place: str = link.label) -> Kept[AccessEntry] | None:
        return KeptFile(path, place, CODEC).read()

    found = read()
    assert found is not None
    assert [entry.record for entry in found.entries.values()] == [key]
    assert read(link.label.replace("lora-sidecar", "another")) is None
    sound = path.read_bytes()
    for name, value in (("format", "2"), ("answered_at", "1000.5"), ("answered_at", "nan"), ("applied", "")):
        with closing(sqlite3.connect(path)) as database, database:
            database.execute("UPDATE meta SET value = ? WHERE name = ?", (value, name))
        assert read() is None
        path.write_bytes(sound)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE meta SET value = '9e12' WHERE name = 'answered_at'")
    found = read()
    assert found is not None
    assert found.answered_at < 9e11, "a time to come would never be too long ago"
    for bad in (b"", sound[: len(sound) // 2], b"x" * 4096):
        path.write_bytes(bad)
        assert read() is None
    async with AsyncExitStack() as stack:
        await replica(stack, server.url, data)
        await is_copied(data, key.id)
    found = read()
    assert found is not None


async def test_a_copy_from_before_a_restore_is_dropped(server: Server, tmp_path: Path) -> None:
    """The restored state has less than the replica knew, and an older content of what both have."""
    (known, kept), (late, gone) = new_key(), new_key()
    place = StateLocation(None, RedisLocation(parse_address(server.url)))
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(cuttable(server))
        async with AsyncExitStack() as first:
            one = await replica(first, proxy.url, tmp_path / "data")
            await one.store.put(kept)
            await backup(place, tmp_path / "backup.zip")
            await one.store.put(gone)
            await one.store.put(kept.model_copy(update={"note": "later"}))
            assert (one.admits(known), one.admits(late)) == (True, True)
        await proxy.cut()
        again = await replica(stack, proxy.url, tmp_path / "data")
        assert (again.admits(known), again.admits(late)) == (True, True)
        await restore(place, tmp_path / "backup.zip", force=True)
        await proxy.mend()
        await until(lambda: not again.admits(late))
        assert again.store.keys() == [kept]
        assert again.admits(known)
        other = await replica(stack, server.url)
        assert other.store.keys() == [kept]
        await other.store.put(new_key()[1])
        await until(lambda: again.store.keys() == other.store.keys())
    async with AsyncExitStack() as stack:  # the copy is that of the restored state by now
        await server.kill()
        again = await replica(stack, proxy.url, tmp_path / "data")
        assert len(again.store.keys()) == 2


async def test_names_are_known_to_a_registry_that_starts_without_redis(server: Server, tmp_path: Path) -> None:
    def names() -> RedisRegistry:
        return RedisRegistry(link_to(server.url), kept=tmp_path / "copy.sqlite")

    registry = names()
    await registry.start()
    for name in ("a", "b", "c"):
        await registry.put(record(name), None)
    await registry.delete("b", record("b"))
    await registry.close()
    await server.kill()
    registry = names()
    await registry.start()
    assert registry.all() == [record("a"), record("c")]
    assert registry.last_change == 4
    with pytest.raises(Refused, match="changing an adapter needs Redis at"):
        await registry.put(record("d"), None)
    await server.start()
    await until(lambda: registry.away_since is None)
    await registry.put(record("d"), None)
    assert [found.name for found in registry.all()] == ["a", "c", "d"]
    await registry.close()


async def test_secrets_are_neither_in_redis_nor_in_the_copy_nor_in_the_log(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    data = tmp_path / "data"
    async with AsyncExitStack() as stack:
        one = await replica(stack, server.url, data)
        secret, key = new_key()
        await one.store.put(key)
        one.book.find(secret, 1.0e9)
        await one.store.uses.flush()
        await is_copied(data, key.id)
        await one.store.revoke(key.id)
        with pytest.raises(Misused):
            one.book.find(secret, 1e9)
        async with server.client() as client:
            await client.config_set("rdbcompression", "no")
            await client.save()
    dump = (tmp_path / "server" / "dump.rdb").read_bytes()
    copied = b"".join(path.read_bytes() for path in data.rglob("*") if path.is_file())
    for place in (dump, copied):
        assert key.sha256.encode() in place
        assert secret[-64:].encode() not in place
    assert secret[-64:] not in caplog.text


async def test_a_key_of_a_release_to_come_admits_nobody_and_is_kept(server: Server) -> None:
    """It comes from a newer replica during an update; a key that both know goes on."""

    def newer(entry: object) -> str:
        return CODEC.to_json(entry).replace('"tenant"', '"networks":["10.0.0.0/8"],"tenant"')  # type: ignore[arg-type]

    async with AsyncExitStack() as stack:
        one = await replica(stack, server.url)
        link = Link(RedisLocation(parse_address(server.url)), replace(CODEC, to_json=newer))
        to_come = RedisRegistry(link)
        await to_come.start()
        stack.push_async_callback(to_come.close)
        old, known = new_key()
        await one.store.put(known)
        new, key = new_key()
        await to_come.put(key, None)
        await until(lambda: key.name in one.store.set_aside)
        assert (one.admits(old), one.admits(new)) == (True, False)
        restricted = known.model_copy(update={"note": "now restricted"})
        await until(lambda: to_come.get(known.name) == known)
        await to_come.put(restricted, known)
        await until(lambda: not one.admits(old))
        async with server.client() as client:
            assert "networks" in (await client.hget("{lora-sidecar}:access-entries", known.name) or "")


async def test_the_latest_use_of_any_replica_is_shown(server: Server) -> None:
    async with AsyncExitStack() as stack:
        one, two = [await replica(stack, server.url) for _ in range(2)]
        secret, key = new_key()
        await one.store.put(key)
        await until(lambda: two.admits(secret))
        one.book.find(secret, 1.1e9)
        two.book.find(secret, 1.0e9)
        await one.store.uses.flush()
        await two.store.uses.flush()
        assert await two.store.uses.all() == await one.store.uses.all() == {key.id: 1.1e9}
        two.book.find(secret, 1.2e9)
        await server.kill()
        await until_away(one, two)
        await two.store.uses.flush()
        assert await two.store.uses.all() == {key.id: 1.2e9}
        await server.start()
        await until_back(one, two)
        await two.store.uses.flush()
        assert await one.store.uses.all() == {key.id: 1.2e9}


@pytest.mark.parametrize("kind", ["cluster", "sentinel", "valkey"])
async def test_keys_in_each_kind_of_redis(tmp_path: Path, kind: str) -> None:
    async with AsyncExitStack() as stack:
        if kind == "cluster":
            nodes = await stack.enter_async_context(cluster(tmp_path))
            url = f"redis+cluster://{','.join(node.address for node in nodes)}"
        elif kind == "sentinel":
            url = (await stack.enter_async_context(watched(tmp_path))).url
        else:
            url = (await stack.enter_async_context(running(tmp_path / "server", "valkey-server"))).url
        one, two = [await replica(stack, url, tmp_path / f"data-{number}") for number in range(2)]
        secret, key = new_key()
        await one.store.put(key)
        await until(lambda: two.admits(secret))
        assert await one.store.uses.all() == {}
        await two.store.uses.flush()
        assert (await one.store.uses.all()).keys() == {key.id}
        await two.store.revoke(key.id)
        await until(lambda: not one.admits(secret))
        await one.store.remove(key.name)
        await until(lambda: two.store.keys() == [])
