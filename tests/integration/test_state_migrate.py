"""`sidecar state migrate`: what a data directory has into a Redis and back, and what stays where it was."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

import sidecar as product
from sidecar.access.backup import HOLDINGS
from sidecar.access.budgets import leases
from sidecar.access.entries import CODEC
from sidecar.access.store import USED_IN_REDIS
from sidecar.errors import SidecarError
from sidecar.ownership.effects import SendBeat
from sidecar.ownership.facts import Member
from sidecar.state.records import Record, added, promoted, refreshed
from sidecar.state.redis import member_scripts, scripts
from sidecar.state.redis.link import REGISTRY_KEYS
from sidecar.state.redis.members import RedisMembers
from sidecar.state.redis.scripts import Script
from sidecar.state.registry import FORMAT_FILE, LOCK_FILE, REGISTRY_FILE, SqliteRegistry, lock_data_directory
from tests.integration.test_cli_keys import sidecar as asked
from tests.kit.cli_runs import Ended, runner
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.redis_servers import Server, running
from tests.kit.registries import adapter, link_to, record, shared_registry
from tests.kit.replica_pool import CALM_S, replicas
from tests.kit.serving import Serving, serving, until, until_async, write_adapters


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
            "last_change": 7, "keys": 0, "limits": 0, "uses": 0, "budgets": 0, "stay_revoked": [], "unread": [],
            "left": [], "dry_run": False,
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
    assert (ended.code, ended.out.splitlines()[0]) == (
        0, "copied 4 adapters with 6 versions and 9 changes; the last change is 9",
    )  # fmt: skip
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


CONFIG: dict[str, Any] = {
    "identity": {"mode": "enforce"},
    "access": {"limits": [{"tenant": "*", "requests_per_day": 60}]},
}


async def used_with(served: Serving, secret: str) -> int:
    """Ask with a key over HTTP; return the status."""
    async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}", trust_env=False) as http:
        body = {"model": "a00", "prompt": "x", "max_tokens": 2}
        headers = {"authorization": f"Bearer {secret}"}
        answer = await http.post("/v1/completions", json=body, headers=headers)
    await served.sidecar.access.store.uses.flush()
    return answer.status_code


async def taken_by(served: Serving, tenant: str) -> list[int]:
    """Return what a tenant has taken of each of its limits, as `sidecar limits list` tells."""
    code, out, _ = await asked(served, "limits", "list", "--tenant", tenant, "--json")
    assert code == 0

    return [limit["taken"]["requests_per_day"] for limit in json.loads(out)]


async def test_everything_that_the_target_can_hold_goes_there_and_back(
    server: Server, tmp_path: Path, command: Callable[..., Ended]
) -> None:
    """A process's keys, limits, budgets and last uses; the Redis has them once, also for the process of the disk."""
    folder, data = tmp_path / "adapters", tmp_path / "data"
    write_adapters(folder, 1)
    write_adapter(tmp_path / "pushed", seed=7)
    async with running_engine(compute="none", shape="tiny") as engine:
        async with serving([engine], folder, data_directory=str(data), **CONFIG) as served:
            _, out, _ = await asked(served, "keys", "create", "--tenant", "acme", "--json")
            secret = json.loads(out)["secret"]
            _, out, _ = await asked(served, "keys", "create", "--tenant", "other", "--json")
            await asked(served, "keys", "revoke", json.loads(out)["id"])
            await asked(served, "limits", "set", "acme", "--requests-per-day", "40")
            await asked(served, "adapters", "register", "pushed", str(tmp_path / "pushed"), "--push")
            for _ in range(3):
                assert await used_with(served, secret) == 200
            assert await taken_by(served, "acme") == [3, 3]
            entries = served.sidecar.access.store.keys(), served.sidecar.access.store.limits()
            uses = await served.sidecar.access.store.uses.all()

        ended = await migrate(command, str(data), server.url, "--json")
        assert ended.code == 0, ended.err
        moved = ended.json()
        assert {what: moved[what] for what in ("adapters", "keys", "limits", "uses")} == {
            "adapters": 2, "keys": 2, "limits": 1, "uses": 1,
        }  # fmt: skip
        assert moved["budgets"] > 0
        left = {each["what"]: each["places"] for each in moved["left"]}
        assert left.keys() == {
            "usage", "the audit", "the journal", "files of adapters", "packed weights", "weights that were pushed",
        }  # fmt: skip
        assert left["weights that were pushed"] == ["pushed"]

        shared: dict[str, Any] = CONFIG | {"state": {"url": server.url}}
        async with serving([engine], folder, data_directory=str(data), **shared) as of_the_disk:
            assert await taken_by(of_the_disk, "acme") == [3, 3]
        async with serving([engine], folder, data_directory=str(tmp_path / "other"), **shared) as new:
            assert (new.sidecar.access.store.keys(), new.sidecar.access.store.limits()) == entries
            assert await new.sidecar.access.store.uses.all() == uses
            assert await taken_by(new, "acme") == [3, 3]
            assert await used_with(new, secret) == 200
            assert await taken_by(new, "acme") == [4, 4]
            await until_async(partial(_all_is_given_back, server, 4))
            entries = new.sidecar.access.store.keys(), new.sidecar.access.store.limits()

        ended = await migrate(command, server.url, str(tmp_path / "back"))
        assert ended.code == 0, ended.err
        assert "copied 2 keys and the last use of 1, 1 limit, and what is taken of 1 budget\n" in ended.out
        assert "weights that were pushed (pushed): " in ended.out
        async with serving([engine], folder, data_directory=str(tmp_path / "back"), **CONFIG) as back:
            assert (back.sidecar.access.store.keys(), back.sidecar.access.store.limits()) == entries
            assert await taken_by(back, "acme") == [4, 4]
            assert await used_with(back, secret) == 200


async def _all_is_given_back(server: Server, taken: int) -> bool:
    """Return True once nothing is leased ahead of its use."""
    async with server.client() as client:
        return [await client.hget(key, "total") async for key in client.scan_iter("*:budget:*")] == [str(taken)]


TABLES = {
    "adapters": "names", "changes": "names", "entries": "keys and limits", "used": "last uses of keys",
    "budgets": "what is taken of budgets", "periods": "usage", "meta": "what a running process needs for itself",
}  # fmt: skip
"""The SQLite tables of a data directory, and what has them; copies of a Redis have `entries` too, and usage `used`."""


def known(name: str) -> bool:
    return any(holding.has(name) for holding in HOLDINGS)


async def test_what_is_kept_anywhere_is_moved_or_said_to_stay(server: Server, tmp_path: Path) -> None:
    """Whatever a replica writes, each key of a script, each table. A new one needs a place in HOLDINGS."""
    write_adapters(tmp_path / "adapters", 1)
    limited: dict[str, Any] = {"access": CONFIG["access"], "lease_s": CALM_S, "data_directory": str(tmp_path / "data")}
    async with (
        running_engine(compute="none", shape="tiny") as engine,
        replicas(1, server.url, [engine], tmp_path / "adapters", **limited) as (one,),
    ):
        await until(lambda: "a00" in one.state.names)
        await one.ask("a00")
        await asked(one, "keys", "create", "--tenant", "acme")
        await one.sidecar.access.limits.taken([], "")
    keys = {key async for key in _keys_of(server)}
    prefixed = {CODEC.prefix + (CODEC.table if key == "adapters" else key) for key in REGISTRY_KEYS}
    declared = {key for script in _scripts() for key in script.keys}
    assert {key for key in keys | prefixed | declared | {USED_IN_REDIS} if not known(key)} == set()
    assert {"members", "leases", "access-meta", "budgets"} <= keys
    data = tmp_path / "data"
    paths = {str(path.relative_to(data)) for path in (*data.iterdir(), *(data / "access").iterdir())}
    assert {path for path in paths if not known(re.sub("-(wal|shm)$", "", path))} == {"access", LOCK_FILE, FORMAT_FILE}
    sources = [path.read_text() for path in Path(product.__file__).parent.rglob("*.py")]
    tables = {table for text in sources for table in re.findall(r"CREATE TABLE IF NOT EXISTS (\w+)", text)}
    assert tables == TABLES.keys() - {"adapters", "entries"} | {"entries"}
    assert set(TABLES.values()) <= {holding.what for holding in HOLDINGS}


async def _keys_of(server: Server) -> AsyncIterator[str]:
    async with server.client() as client:
        async for key in client.scan_iter():
            yield key.removeprefix("{lora-sidecar}:")


def _scripts() -> list[Script]:
    modules = (leases, member_scripts, scripts)
    return [each for module in modules for each in vars(module).values() if isinstance(each, Script)]
