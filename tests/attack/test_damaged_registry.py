"""Rows of the registry that nobody can use: damaged, of a release to come, or such that a core fails on them."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from redis.asyncio import Redis

from sidecar.access.backup import StateLocation, migrate
from sidecar.core import core as core_module
from sidecar.core import events as ev
from sidecar.proto import admin_pb2 as pb
from sidecar.state.registry import REGISTRY_FILE, SqliteRegistry
from sidecar.state.written import to_json
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.redis_servers import running
from tests.kit.registries import record, shared_registry
from tests.kit.serving import Serving, serving, until

DUMMY = {"compute": "none", "shape": "tiny"}


def changed(**fields: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | fields)


def in_version(**fields: Any) -> Callable[[str], str]:
    def change(text: str) -> str:
        written = json.loads(text)
        written["versions"][0] |= fields
        return json.dumps(written)

    return change


BAD: dict[str, Callable[[str], str]] = {
    "nothing": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "not json": lambda text: "\x00\xff{",
    "a list": lambda text: "[]",
    "deep": lambda text: "[" * 100_000,
    "a long number": lambda text: "9" * 10_000,
    "a field that is gone": lambda text: text.replace('"generation"', '"generations"'),
    "no such version": changed(current=7),
    "no versions": changed(versions=[]),
    "text for a number": changed(current="1"),
    "a declaration of a release to come": changed(declared={"said": "x", "new": 1, "prefetch": None}),
    "a wrong share": changed(canary=[1, 4000]),
    "no digest": in_version(digest="x"),
    "a generation below zero": in_version(generation=-1),
    "layers without end": in_version(rows={"layers": 10**12, "each": [["attn_q", 1, 8, 64, 64]]}),
    "rows of text": in_version(rows=[["attn_q", "1", 0, 8, 64, 64]]),
    "rank zero": in_version(rows=[["attn_q", 1, 0, 0, 64, 64]]),
    "half a character": in_version(origin="\ud800"),
    "labels of numbers": in_version(labels={"a": 1}),
}


async def figure(served: Serving, name: str) -> float:
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"http://{served.sidecar.http_address}/metrics")).text
    (line,) = [line for line in text.splitlines() if line.startswith(f"lora_sidecar_{name} ")]
    return float(line.split()[1])


async def filled(data: Path, roots: Path, engine: Any, names: list[str]) -> None:
    """Have a sidecar register adapters in a data directory."""
    async with serving([engine], roots=[roots], data_directory=str(data)) as served:
        for name in names:
            await served.adapters.Register(pb.RegisterRequest(name=name, path=str(roots / name)))


async def test_bad_rows_of_a_file_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All kinds in one start: logged with name and way out, counted; the others are served; registering anew mends."""
    roots, data = tmp_path / "adapters", tmp_path / "data"
    names = ["sound", *(f"bad-{number}" for number in range(len(BAD)))]
    for seed, name in enumerate(names):
        write_adapter(roots / name, seed=seed)
    async with running_engine(**DUMMY) as engine:
        await filled(data, roots, engine, names)
        with sqlite3.connect(data / REGISTRY_FILE) as database:
            for number, damage in enumerate(BAD.values()):
                name = f"bad-{number}"
                (text,) = database.execute("SELECT record FROM adapters WHERE name = ?", (name,)).fetchone()
                database.execute("UPDATE adapters SET record = ? WHERE name = ?", (damage(text), name))
        database.close()
        caplog.set_level(logging.ERROR, "sidecar.shell.catalogue")
        async with serving([engine], roots=[roots], data_directory=str(data)) as served:
            assert list(served.state.names) == ["sound"]
            assert await figure(served, "adapters_set_aside") == len(BAD)
            for number in range(len(BAD)):
                (line,) = [text for text in caplog.messages if f"'bad-{number}' is set aside" in text]
                assert "register it again" in line
            assert [adapter.name for adapter in (await served.adapters.List(pb.ListAdaptersRequest())).adapters] == [
                "sound"
            ]
            assert (await served.ask("sound", 3)).tokens == served.expected("sound", 3)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.ask("bad-0", 3)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            await served.adapters.Register(pb.RegisterRequest(name="bad-0", path=str(roots / "bad-0")))
            assert (await served.ask("bad-0", 3)).tokens == served.expected("bad-0", 3)
            assert await figure(served, "adapters_set_aside") == len(BAD) - 1
        moved = await migrate(StateLocation(data), StateLocation(tmp_path / "moved"))
        assert moved["unread"] == sorted(f"bad-{number}" for number in range(1, len(BAD)))
        copied, kept = (sqlite3.connect(each / REGISTRY_FILE) for each in (tmp_path / "moved", data))
        rows = "SELECT name, record FROM adapters ORDER BY name"
        assert copied.execute(rows).fetchall() == kept.execute(rows).fetchall()
        copied.close()
        kept.close()


async def test_a_record_that_makes_the_core_fail_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The fault is put into the core's own handler: no record is known that finds one. It is tried on another core."""
    roots, data = tmp_path / "adapters", tmp_path / "data"
    for seed, name in enumerate(("one", "poison", "two")):
        write_adapter(roots / name, seed=seed)
    async with running_engine(**DUMMY) as engine:
        await filled(data, roots, engine, ["one", "poison", "two"])
        handler = core_module.HANDLERS[ev.AdapterRegistered]

        def failing(turn: Any, event: Any) -> None:
            handler(turn, event)
            if event.name == "poison" and event.versions[0].generation == 0:
                raise ZeroDivisionError("its facts")

        monkeypatch.setitem(core_module.HANDLERS, ev.AdapterRegistered, failing)
        async with serving([engine], roots=[roots], data_directory=str(data)) as served:
            assert list(served.state.names) == ["one", "two"]
            assert await figure(served, "adapters_set_aside") == 1
            assert "'poison' is set aside" in caplog.text
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await served.adapters.Get(pb.AdapterRequest(name="poison"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            for name in ("one", "two"):
                assert (await served.ask(name, 3)).tokens == served.expected(name, 3)
            monkeypatch.setitem(core_module.HANDLERS, ev.AdapterRegistered, handler)
            await served.adapters.Register(pb.RegisterRequest(name="poison", path=str(roots / "poison")))
            assert (await served.ask("poison", 3)).tokens == served.expected("poison", 3)
            assert await figure(served, "adapters_set_aside") == 0


async def test_bad_values_of_a_redis_are_set_aside(tmp_path: Path) -> None:
    """Found at start and as they come: the feed goes on, nothing is lost by reading, registering anew mends."""
    async with (
        running(tmp_path / "server", "redis-server") as server,
        shared_registry(server.url) as first,
        Redis.from_url(server.url) as client,
    ):
        for number, name in enumerate(["sound", *(f"bad-{number}" for number in range(len(BAD) + 3))]):
            await first.put(record(name, number + 1), None)
        (key,) = [key for key in await client.keys("*") if key.endswith(b"adapters")]
        damages: list[Callable[[bytes], bytes]] = [
            lambda value: b"",
            lambda value: b"no head at all",
            lambda value: value[:-40] + b"\xff\xfe\x80",
            *(_in_value(damage) for damage in BAD.values()),
        ]
        for number, damage in enumerate(damages):
            value = await client.hget(key, f"bad-{number}")
            assert value is not None
            await client.hset(key, f"bad-{number}", damage(value))
        before = await client.hgetall(key)
        async with shared_registry(server.url) as second:
            assert [known.name for known in second.all()] == ["sound"]
            # A forgotten name has a head and no record, so that one of the cases is no damage.
            assert sorted(second.set_aside) == sorted(f"bad-{n}" for n in range(len(damages)) if n != 3)
            await first.put(record("later", 99), None)
            await until(lambda: second.get("later") is not None)
            for name in ("bad-0", "bad-1", "bad-2", "bad-5"):
                await second.put(record(name, 50), None)
                assert second.get(name) == record(name, 50)
                assert name not in second.set_aside
        after = await client.hgetall(key)
        kept = [f"bad-{n}".encode() for n in range(len(damages)) if n not in (0, 1, 2, 5)]
        assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def _in_value(damage: Callable[[str], str]) -> Callable[[bytes], bytes]:
    def change(value: bytes) -> bytes:
        head, text = value[: value.index(b"{")], value[value.index(b"{") :]
        return head + damage(text.decode()).encode("utf-8", "surrogatepass")

    return change


async def test_a_record_of_a_release_to_come_is_put_back_as_it_is(tmp_path: Path) -> None:
    """A replica that cannot read it still holds it when Redis loses its data."""
    async with (
        running(tmp_path / "server", "redis-server") as server,
        shared_registry(server.url) as registry,
        Redis.from_url(server.url) as client,
    ):
        await registry.put(record("sql"), None)
        (key,) = [key for key in await client.keys("*") if key.endswith(b"adapters")]
        future = to_json(record("sql")).replace('"versions"', '"lineage"')
        value = (await client.hget(key, "sql")).decode()  # type: ignore[union-attr]
        await client.hset(key, "sql", value[: value.index("{")] + future)
        async with shared_registry(server.url) as reader:
            assert list(reader.set_aside) == ["sql"]
            await registry.close()
            await client.flushall()
            await until(lambda: reader.away_since is None and reader.incarnation != "")
            while not await client.hexists(key, "sql"):  # put back by the one who could not read it
                await until(lambda: True)
            restored = (await client.hget(key, "sql")).decode()  # type: ignore[union-attr]
            assert restored.endswith(future)


def test_the_memory_registry_has_none(tmp_path: Path) -> None:
    """Nothing is set aside where nothing was."""
    assert SqliteRegistry(None).set_aside == {}
