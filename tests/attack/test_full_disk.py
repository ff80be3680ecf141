"""Registrations and pushes while the disk under the data directory is full, read-only, locked or damaged.

The disks are real: a small tmpfs that is mounted for the test. Where mounting is not possible those tests are skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.errors import Reason, Refused
from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc
from sidecar.state.registry import REGISTRY_FILE, SqliteRegistry
from tests.attack.test_asked_again_at_the_write import OPERATOR, Publisher, bearer, enforced
from tests.integration.test_push import chunks_of, messages, start_of
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving, until, until_async

DUMMY = {"compute": "none", "shape": "tiny"}
DISK_BYTES = 4 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Give the mount point of a disk of a few MiB."""
    point = tmp_path / "disk"
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(point)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


def fill(disk: Path) -> Path:
    """Take what is left of a disk, to the last block."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


def house(engine: Any, data: Path, roots: Path) -> Any:
    return serving([engine], roots=[roots], data_directory=str(data))


async def registered(served: Serving, path: Path, name: str) -> Any:
    return await served.adapters.Register(pb.RegisterRequest(name=name, path=str(path)))


async def refusal(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    words = caught.value.details() or ""
    assert "Unexpected" not in words
    return words


async def pushed(served: Serving, requests: AsyncIterator[Any]) -> Any:
    return await served.adapters.Push(requests)


async def whole(folder: Path, name: str) -> AsyncIterator[Any]:
    for request in messages(start_of(folder, name), chunks_of(folder)):
        yield request


async def test_a_registration_on_a_full_disk(disk: Path, tmp_path: Path) -> None:
    """It is told what to do but no path, nothing of it is left, others are served; with room again it goes on."""
    first, second = (write_adapter(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b")))
    data = disk / "data"
    async with running_engine(**DUMMY) as engine:
        async with house(engine, data, tmp_path) as served:
            await registered(served, first, "a")
            filler = fill(disk)
            for _ in range(3):
                words = await refusal(registered(served, second, "b"))
                assert "data directory is full" in words
                assert str(disk) not in words
                assert "free some" in words
                assert list(served.state.names) == ["a"]
            words = await refusal(served.adapters.Pin(pb.AdapterRequest(name="a")))
            assert "full" in words
            assert not (await served.adapters.Get(pb.AdapterRequest(name="a"))).pinned
            words = await refusal(pushed(served, whole(second, "b")))
            assert str(disk) not in words
            await until(lambda: not list((data / "incoming").iterdir()) and not list((data / "sources").iterdir()))
            assert (await served.ask("a", 3)).tokens == served.expected("a", 3)
            filler.unlink()
            await registered(served, second, "b")
            await pushed(served, whole(second, "c"))
        async with house(engine, data, tmp_path) as served:
            assert sorted(served.state.names) == ["a", "b", "c"]
            assert {record.name: record.current for record in served.sidecar.registry.all()} == {"a": 1, "b": 1, "c": 1}


async def test_the_verdict_says_that_nothing_can_be_written(disk: Path, tmp_path: Path) -> None:
    """What failed last is named in the first line of the queue, for as long as it fails; requests go on."""
    folder = write_adapter(tmp_path / "a")

    async def verdict() -> str:
        return str((await served.queues.Get(pb.QueueRequest())).verdict)

    async def tells(what: str) -> bool:
        await served.ask("a", 3)
        with suppress(grpc.aio.AioRpcError):
            await served.adapters.Pin(pb.AdapterRequest(name="a"))
            await served.adapters.Unpin(pb.AdapterRequest(name="a"))
        await served.sidecar.usage.write()
        return what in await verdict()

    async with running_engine(**DUMMY) as engine, house(engine, disk / "data", tmp_path) as served:
        await registered(served, folder, "a")
        assert "written" not in await verdict()
        filler = fill(disk)
        await until_async(partial(tells, "names"))
        await until_async(partial(tells, "the audit"))
        await until_async(partial(tells, "the journal"))
        assert "cannot be written: the log says why; nobody waits" in await verdict()
        filler.unlink()
        for what in ("names", "the audit", "usage"):
            await until_async(partial(_tells_no_more, tells, what))


async def _tells_no_more(tells: Callable[[str], Awaitable[bool]], what: str) -> bool:
    return not await tells(what)


@pytest.mark.parametrize("chunk_bytes", [3000, 10_000])
async def test_a_disk_that_fills_up_during_a_push(chunk_bytes: int, disk: Path, tmp_path: Path) -> None:
    """What had come is removed, and the client hears why."""
    folder, data = write_adapter(tmp_path / "a", rank=64), disk / "data"

    async def filling() -> AsyncIterator[Any]:
        requests = messages(start_of(folder), chunks_of(folder, chunk_bytes))
        for number, request in enumerate(requests):
            if number == len(requests) // 2:
                await until(lambda: any((data / "incoming").glob("*/*.safetensors")))
                fill(disk)
            yield request

    async with running_engine(**DUMMY) as engine, house(engine, data, tmp_path) as served:
        words = await refusal(pushed(served, filling()))
        assert "no room" in words
        assert str(disk) not in words
        await until(lambda: not list((data / "incoming").iterdir()))
        assert not served.state.names


async def test_a_key_that_is_revoked_while_the_disk_is_full(disk: Path, tmp_path: Path) -> None:
    """It is refused at once; that it is not on disk is told, and mended as soon as there is room."""
    data, config = disk / "data", enforced(tmp_path)
    write_adapter(tmp_path / "a")
    async with running_engine(**DUMMY) as engine:
        async with serving([engine], roots=[tmp_path], data_directory=str(data), **config) as served:
            acme, other = await Publisher.of(served, "acme"), await Publisher.of(served, "blue")
            await acme.register(str(tmp_path / "a"))
            filler = fill(disk)
            words = await refusal(acme.revoke())
            assert f"the key {acme.key} is refused here from now on" in words
            assert "not on disk yet" in words
            for call in (acme.register(str(tmp_path / "a")), served.ask("sql", 1)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert await state_of(served, acme.key) == "revoked"
            assert "not on disk yet" in await refusal(acme.revoke())
            assert revoked_on_disk(data) == set()
            filler.unlink()
            await until(lambda: revoked_on_disk(data) == {acme.key})
            await acme.revoke()
            assert await state_of(served, other.key) == "active"
        async with serving([engine], roots=[tmp_path], data_directory=str(data), **config) as served:
            assert await state_of(served, acme.key) == "revoked"


async def state_of(served: Serving, key: str) -> str:
    access: Any = admin_pb2_grpc.AccessStub(served.admin_channel)  # type: ignore[no-untyped-call]
    listed = await access.ListKeys(pb.ListKeysRequest(), metadata=bearer(OPERATOR))
    return next(str(each.state) for each in listed.keys if each.id == key)


def revoked_on_disk(data: Path) -> set[str]:
    """Return the keys that are revoked in the file, as another process reads it."""
    with closing(sqlite3.connect(data / "access" / "access.sqlite", timeout=0)) as database:
        records = [json.loads(text) for (text,) in database.execute("SELECT record FROM entries")]
    return {record["id"] for record in records if record.get("revoked_at")}


def test_a_disk_that_has_become_read_only(disk: Path) -> None:
    """As file systems do after a fault of the device."""
    asyncio.run(SqliteRegistry(disk / REGISTRY_FILE).close())
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(Refused) as caught:
        SqliteRegistry(disk / REGISTRY_FILE)
    assert caught.value.reason is Reason.STATE_UNAVAILABLE
    assert str(disk / REGISTRY_FILE) in caught.value.message
    assert "mounted for writing" in caught.value.message


async def test_a_database_that_another_process_has_locked(tmp_path: Path) -> None:
    """It is refused at once, and not after the event loop has stood still; when the lock is gone it goes on."""
    folder, data = write_adapter(tmp_path / "a"), tmp_path / "data"
    async with running_engine(**DUMMY) as engine, house(engine, data, tmp_path) as served:
        other = sqlite3.connect(data / REGISTRY_FILE, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        words = await refusal(registered(served, folder, "a"))
        assert "another process" in words
        assert str(data / REGISTRY_FILE) in words
        assert not served.state.names
        other.execute("ROLLBACK")
        other.close()
        assert (await registered(served, folder, "a")).adapter.version == "a@v1"


@pytest.mark.parametrize("kind", ["damaged", "other", "folder", "text"])
def test_a_file_that_is_no_registry(kind: str, tmp_path: Path) -> None:
    """The start ends with the file's name and the way out, whatever lies there instead."""
    path = tmp_path / REGISTRY_FILE
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_bytes(os.urandom(8192))
    else:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE adapters (name TEXT, other TEXT)")
            database.executemany("INSERT INTO adapters VALUES (?, ?)", ((str(n), "x" * 900) for n in range(100)))
        database.close()
        if kind == "damaged":
            data = bytearray(path.read_bytes())
            data[4096:] = os.urandom(len(data) - 4096)
            path.write_bytes(data)
    with pytest.raises(Refused) as caught:
        SqliteRegistry(path)
    assert caught.value.reason is Reason.STATE_UNAVAILABLE
    assert str(path) in caught.value.message
    assert "move it away" in caught.value.message or "cannot be opened for writing" in caught.value.message
