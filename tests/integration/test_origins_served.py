"""Adapters from a web server, end to end: registered by URL, served, lost and fetched again, updated, forgotten."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.core.effects import Fetch
from sidecar.proto import admin_pb2 as pb
from tests.kit.emulated import running_engine
from tests.kit.faulty_http import Fault, FaultyServer, faulty_server
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving, until

WEIGHTS = "adapter_model.safetensors"
DUMMY = {"compute": "none", "shape": "tiny"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    with faulty_server() as running:
        running.serve("sql", write_adapter(tmp_path / "origin"))
        yield running


def configured(server: FaultyServer, tmp_path: Path, **record: Any) -> dict[str, Any]:
    origins = {"allow": [server.url("")], "attempts_max": 1}
    return {"origins": origins, "data_directory": str(tmp_path / "data"), "store": {"disk_bytes": 0}} | record


async def register(served: Serving, path: str, name: str = "sql") -> Any:
    return await served.adapters.Register(pb.RegisterRequest(name=name, path=path))


async def answers(served: Serving) -> None:
    assert (await served.ask("sql", 3)).tokens == served.expected("sql", 3)


async def evict(served: Serving) -> None:
    await served.adapters.Evict(pb.AdapterRequest(name="sql"))


def sources_of(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "data" / "sources").iterdir()]


def left_in(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "data" / "incoming").iterdir())


async def failed(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_an_adapter_by_url_is_served_lost_and_fetched_again(server: FaultyServer, tmp_path: Path) -> None:
    """The spool serves misses; when it has lost the files 64 requests at once are one download."""
    async with (
        running_engine(**DUMMY, lora_host_pages=1) as engine,
        serving([engine], roots=[tmp_path / "local"], **configured(server, tmp_path)) as served,
    ):
        answer = await register(served, server.url("sql?token=s3cret"))
        assert answer.adapter.path == server.url("sql")
        assert not answer.unchanged
        assert sources_of(tmp_path) == [answer.adapter.digest]
        await answers(served)
        await evict(served)
        assert server.count(WEIGHTS) == 1
        shutil.rmtree(tmp_path / "data" / "sources" / answer.adapter.digest)
        await until(lambda: not served.state.store.entries)
        await make_the_engine_forget(served, tmp_path)
        await asyncio.gather(*(answers(served) for _ in range(64)))
        assert server.count(WEIGHTS) == 2
        assert sources_of(tmp_path) == [answer.adapter.digest]
        await served.adapters.Unregister(pb.UnregisterRequest(name="sql"))
        await until(lambda: sources_of(tmp_path) == [] and left_in(tmp_path) == [])


async def make_the_engine_forget(served: Serving, tmp_path: Path) -> None:
    """Have the engine, which holds one adapter, load another."""
    await register(served, str(write_adapter(tmp_path / "local", seed=7)), "other")
    await served.ask("other", 2)


async def test_other_content_at_the_origin(server: FaultyServer, tmp_path: Path) -> None:
    """A miss that finds it is refused with the reason; registered again it is a new version, and both are kept."""
    async with (
        running_engine(**DUMMY, lora_host_pages=1) as engine,
        serving([engine], roots=[tmp_path / "local"], **configured(server, tmp_path)) as served,
    ):
        first = (await register(served, server.url("sql"))).adapter
        await answers(served)
        server.serve("sql", write_adapter(tmp_path / "second", seed=1))
        await answers(served)  # the old version is held
        await evict(served)
        shutil.rmtree(tmp_path / "data" / "sources" / first.digest)
        await make_the_engine_forget(served, tmp_path)
        error = await failed(served.ask("sql", 3))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "now holds other content" in (error.details() or "")
        assert left_in(tmp_path) == []
        second = (await register(served, server.url("sql"))).adapter
        assert second.version == "sql@v2"
        await answers(served)
        assert sources_of(tmp_path) == [second.digest]


async def test_a_damaged_source_is_fetched_again(server: FaultyServer, tmp_path: Path) -> None:
    """Bytes that changed on disk reach no engine: the digest is wrong, the copy goes, the origin has a better one."""
    async with running_engine(**DUMMY) as engine, serving([engine], **configured(server, tmp_path)) as served:
        digest = (await register(served, server.url("sql"))).adapter.digest
        weights = tmp_path / "data" / "sources" / digest / WEIGHTS
        sound = weights.read_bytes()
        weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        await answers(served)
        assert weights.read_bytes() == sound
        assert server.count(WEIGHTS) == 2


async def test_a_restart_downloads_nothing(server: FaultyServer, tmp_path: Path) -> None:
    """Sources and names survive in the data directory; a source without a name does not."""
    async with running_engine(**DUMMY) as engine:
        async with serving([engine], **configured(server, tmp_path)) as served:
            digest = (await register(served, server.url("sql"))).adapter.digest
        shutil.copytree(tmp_path / "data" / "sources" / digest, tmp_path / "data" / "sources" / ("0" * 64))
        async with serving([engine], **configured(server, tmp_path)) as served:
            await answers(served)
            await until(lambda: sources_of(tmp_path) == [digest])
    assert server.count(WEIGHTS) == 1


async def test_one_that_cannot_be_fetched_leaves_the_others_alone(server: FaultyServer, tmp_path: Path) -> None:
    """Not allowed, not there, too large, cut off: each with its code and reason, nothing left, serving goes on."""
    record = configured(server, tmp_path, store={"memory_bytes": 150_000, "disk_bytes": 0})
    record["origins"]["size_bytes_max"] = 1 << 20
    server.serve("wide", write_adapter(tmp_path / "wide", rank=64, modules=("gate_proj", "up_proj", "down_proj")))
    server.serve("cut", tmp_path / "origin")
    server.serve("huge", tmp_path / "origin")
    server.always = {f"cut/{WEIGHTS}": Fault(body_max=10), f"huge/{WEIGHTS}": Fault(length=1 << 21)}
    async with running_engine(**DUMMY) as engine, serving([engine], **record) as served:
        await register(served, server.url("sql"))
        for url, code, words in (
            ("https://elsewhere.example/x", grpc.StatusCode.PERMISSION_DENIED, "outside the allowed origins"),
            ("file:///etc", grpc.StatusCode.PERMISSION_DENIED, "is not one of"),
            (server.url("none"), grpc.StatusCode.NOT_FOUND, "it has no adapter_config.json"),
            (server.url("cut"), grpc.StatusCode.UNAVAILABLE, "try again later"),
            (server.url("huge"), grpc.StatusCode.FAILED_PRECONDITION, "origins.size_bytes_max"),
            (server.url("wide"), grpc.StatusCode.FAILED_PRECONDITION, "store.memory_bytes"),
        ):
            error = await failed(register(served, url, "bad"))
            assert (error.code(), words in (error.details() or "")) == (code, True), error.details()
            assert "bad" in (error.details() or "")
        await until(lambda: not left_in(tmp_path) and len(sources_of(tmp_path)) == 1)
        assert list(served.state.names) == ["sql"]
        await answers(served)


async def test_by_default_only_local_roots(server: FaultyServer, tmp_path: Path) -> None:
    """Without origins.allow no connection is made for a registration."""
    async with running_engine(**DUMMY) as engine, serving([engine], roots=[tmp_path]) as served:
        error = await failed(register(served, server.url("sql")))
        assert "(no URL); add a prefix of it to origins.allow" in (error.details() or "")
        assert server.asked == []
        await register(served, str(tmp_path / "origin"))
        await answers(served)
        assert served.recorder.count(Fetch) == 1
