"""Adapters that a client sends: whole they are served, cut off or wrong they leave nothing."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.origins.limits import Limits
from sidecar.adapters.spool import Spool
from sidecar.config.plugins import policies_of
from sidecar.core.config import CoreConfig
from sidecar.core.facts import EngineFacts
from sidecar.fronts.admin import adapters as push_front
from sidecar.fronts.admin.adapters import Pushes
from sidecar.fronts.admin.front import add_admin
from sidecar.proto import admin_pb2 as pb
from sidecar.proto import admin_pb2_grpc
from sidecar.shell.gateway import Gateway
from sidecar.shell.sources import Sources
from sidecar.state.registry import SqliteRegistry
from tests.kit.cli_runs import runner
from tests.kit.cli_served import guarded
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import GRPCS_OWN
from tests.kit.origins import write_shards
from tests.kit.peft_files import BASE_MODEL, write_adapter
from tests.kit.scripted_backend import ScriptedBackend
from tests.kit.serving import serving, until

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class House:
    """A gateway with an admin listener and a data directory."""

    def __init__(self, gateway: Gateway, address: str, adapters: Any, data: Path) -> None:
        self.gateway = gateway
        self.address = address
        self.adapters = adapters
        self.data = data

    def is_empty(self) -> bool:
        """Whether nothing of any push is left."""
        return not list((self.data / "incoming").iterdir()) and not list((self.data / "sources").iterdir())


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    config, registry = CoreConfig(), SqliteRegistry(None)
    sources = Sources(AllowList(), Spool(tmp_path / "data"), Limits(size_bytes_max=100_000))
    gateway = Gateway(config, policies_of(config), registry, [], sources=sources)
    await gateway.start([(ScriptedBackend("trt-0"), EngineFacts(base_models=(BASE_MODEL,)))])
    server = grpc.aio.server(interceptors=guarded(gateway))
    add_admin(server, gateway)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield House(gateway, address, admin_pb2_grpc.AdaptersStub(channel), tmp_path / "data")
    await server.stop(None)
    await gateway.stop()
    await registry.close()


def start_of(folder: Path, name: str = "sql", **fields: Any) -> Any:
    files = [
        pb.PushFile(name=f.name, size_bytes=f.stat().st_size, sha256=hashlib.sha256(f.read_bytes()).hexdigest())
        for f in sorted(folder.iterdir())
    ]
    return pb.PushStart(name=name, files=files, **fields)


def chunks_of(folder: Path, size_bytes: int = 4000) -> Iterator[Any]:
    for number, file in enumerate(sorted(folder.iterdir())):
        data = file.read_bytes()
        for offset in range(0, len(data), size_bytes):
            yield pb.PushChunk(file=number, offset=offset, data=data[offset : offset + size_bytes])


def messages(start: Any, chunks: Iterator[Any] | list[Any]) -> list[Any]:
    return [pb.PushRequest(start=start), *(pb.PushRequest(chunk=chunk) for chunk in chunks)]


async def sent(house: House, requests: list[Any]) -> Any:
    async def stream() -> AsyncIterator[Any]:
        for request in requests:
            yield request

    return await house.adapters.Push(stream())


async def failed(house: House, requests: list[Any]) -> tuple[grpc.StatusCode, str]:
    """Return code and message of a push that must fail, having seen that it leaves nothing."""
    while True:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await sent(house, requests)
        if caught.value.details() not in GRPCS_OWN:
            break
    await until(house.is_empty)
    assert not house.gateway.state.names
    return caught.value.code(), caught.value.details() or ""


async def test_a_push_is_a_registration(house: House, tmp_path: Path) -> None:
    """In one file or in shards; the same again is unchanged; the source stays until the name is forgotten."""
    folder = write_adapter(tmp_path / "sql")
    answer = await sent(house, messages(start_of(folder, allow=["acme"], pin=True), chunks_of(folder)))
    adapter = answer.adapter
    assert (adapter.version, list(adapter.allow), adapter.pinned) == ("sql@v1", ["acme"], True)
    assert (adapter.path, adapter.managed_by) == (f"push://{adapter.digest}", "push")
    again = await sent(house, messages(start_of(folder), chunks_of(folder, 1 << 20)))
    assert again.unchanged
    write_shards(folder)
    sharded = await sent(house, messages(start_of(folder), chunks_of(folder)))
    assert sharded.adapter.digest == adapter.digest
    assert [path.name for path in (house.data / "sources").iterdir()] == [adapter.digest]
    await house.adapters.Unregister(pb.UnregisterRequest(name="sql"))
    await until(house.is_empty)


def without(folder: Path, name: str) -> Any:
    start = start_of(folder)
    kept = [file for file in start.files if file.name != name]
    return pb.PushStart(name="sql", files=kept)


def renamed(folder: Path, name: str, to: str) -> Any:
    start = start_of(folder)
    for file in start.files:
        file.name = to if file.name == name else file.name
    return start


def altered(folder: Path, **fields: Any) -> Any:
    start = start_of(folder)
    for key, value in fields.items():
        setattr(start.files[1], key, value)
    return start


WRONG: dict[str, tuple[Callable[[Path], list[Any]], grpc.StatusCode, str]] = {
    "no start": (lambda f: messages(start_of(f), chunks_of(f))[1:], grpc.StatusCode.INVALID_ARGUMENT, "the start"),
    "nothing": (lambda f: [], grpc.StatusCode.INVALID_ARGUMENT, "the start"),
    "two starts": (
        lambda f: messages(start_of(f), [])[:1] * 2, grpc.StatusCode.INVALID_ARGUMENT, "only chunks may follow"
    ),
    "bad name": (lambda f: messages(start_of(f, "../x"), chunks_of(f)), grpc.StatusCode.INVALID_ARGUMENT, "not valid"),
    "no config": (lambda f: messages(without(f, CONFIG), []), grpc.StatusCode.INVALID_ARGUMENT, "not among the files"),
    "no weights": (lambda f: messages(without(f, WEIGHTS), []), grpc.StatusCode.INVALID_ARGUMENT, f"{WEIGHTS} is not"),
    "a path": (
        lambda f: messages(renamed(f, WEIGHTS, "../x.safetensors"), []), grpc.StatusCode.INVALID_ARGUMENT, "no file of"
    ),
    "a pickle": (
        lambda f: messages(renamed(f, WEIGHTS, "adapter_model.bin"), []), grpc.StatusCode.INVALID_ARGUMENT, "no file of"
    ),
    "twice": (
        lambda f: messages(renamed(f, WEIGHTS, CONFIG), []), grpc.StatusCode.INVALID_ARGUMENT, "one of them twice"
    ),
    "no sha256": (lambda f: messages(altered(f, sha256="x"), []), grpc.StatusCode.INVALID_ARGUMENT, "no sha256"),
    "wrong sha256": (
        lambda f: messages(altered(f, sha256="0" * 64), chunks_of(f)), grpc.StatusCode.INVALID_ARGUMENT, "the sha256"
    ),
    "too large": (
        lambda f: messages(altered(f, size_bytes=100_001), []), grpc.StatusCode.FAILED_PRECONDITION, "are allowed"
    ),
    "too large together": (
        lambda f: messages(altered(f, size_bytes=99_999), []), grpc.StatusCode.FAILED_PRECONDITION, "all files together"
    ),
    "too little": (
        lambda f: messages(start_of(f), list(chunks_of(f))[:-1]), grpc.StatusCode.INVALID_ARGUMENT, "it ended after"
    ),
    "too much": (
        lambda f: messages(start_of(f), [*chunks_of(f), pb.PushChunk(file=2, data=b"x")]),
        grpc.StatusCode.INVALID_ARGUMENT, "more is sent than was announced",
    ),
    "more of a file": (
        lambda f: messages(altered(f, size_bytes=10), chunks_of(f)), grpc.StatusCode.INVALID_ARGUMENT, "more of"
    ),
    "out of order": (
        lambda f: messages(start_of(f), list(chunks_of(f))[::-1]), grpc.StatusCode.INVALID_ARGUMENT, "comes next"
    ),
    "an empty chunk": (
        lambda f: messages(start_of(f), [pb.PushChunk()]), grpc.StatusCode.INVALID_ARGUMENT, "a chunk has 0 bytes"
    ),
    "a huge chunk": (
        lambda f: messages(start_of(f), [pb.PushChunk(data=bytes((1 << 20) + 1))]),
        grpc.StatusCode.INVALID_ARGUMENT, "a chunk has 1048577 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(WRONG))
async def test_a_wrong_push_leaves_nothing(kind: str, house: House, tmp_path: Path) -> None:
    """It is refused as soon as it can be known, with the reason."""
    make, code, words = WRONG[kind]
    told = await failed(house, make(write_adapter(tmp_path / "sql")))
    assert told[0] is code
    assert words in told[1]


async def test_an_adapter_that_cannot_be_served_leaves_nothing(house: House, tmp_path: Path) -> None:
    """The files arrived as announced, and are wrong themselves; or no backend can serve them."""
    for options, words in (({"use_dora": True}, "DoRA"), ({"base_model_name_or_path": "other/base"}, "no backend")):
        folder = write_adapter(tmp_path / words, **options)
        code, message = await failed(house, messages(start_of(folder), chunks_of(folder)))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert words in message


async def test_a_push_that_is_cut_off_leaves_nothing(house: House, tmp_path: Path) -> None:
    """The client leaves in the middle: what had come is removed."""
    folder = write_adapter(tmp_path / "sql")
    requests = messages(start_of(folder), chunks_of(folder))
    call = house.adapters.Push()
    for request in requests[: len(requests) // 2]:
        await call.write(request)
    await until(lambda: any((house.data / "incoming").iterdir()))
    call.cancel()
    await until(house.is_empty)
    assert (await sent(house, requests)).adapter.version == "sql@v1"


async def test_a_silent_client_is_not_waited_for(house: House, tmp_path: Path) -> None:
    """Between two messages only so much time may pass."""

    async def silent() -> AsyncIterator[Any]:
        yield pb.PushRequest(start=start_of(write_adapter(tmp_path / "sql")))
        await asyncio.Event().wait()

    with pytest.raises(Exception, match=r"nothing came for 1 s"):
        await Pushes(house.gateway, silence_s_max=1).receive(silent())
    await until(house.is_empty)


async def test_pushes_are_bounded(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More at a time than are allowed are refused, to be tried again."""
    monkeypatch.setattr(push_front, "PUSHES_MAX", 1)
    folder = write_adapter(tmp_path / "sql")
    waiting = house.adapters.Push()
    await waiting.write(messages(start_of(folder), [])[0])
    await until(lambda: any((house.data / "incoming").iterdir()))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await sent(house, messages(start_of(folder), chunks_of(folder)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    waiting.cancel()
    await until(house.is_empty)


async def test_no_room_on_disk(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is announced must fit before any of it is taken."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    folder = write_adapter(tmp_path / "sql")
    code, message = await failed(house, messages(start_of(folder), chunks_of(folder)))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "100 are free" in message


async def test_the_command_pushes(house: House, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`adapters register --push` sends a folder that the sidecar may not read; what is missing is told here."""
    folder, command = write_adapter(tmp_path / "sql"), runner(capfd)
    arguments = ("adapters", "register", "sql", str(folder), "--admin", house.address)
    outside = (await asyncio.to_thread(command, *arguments)).err
    assert "add its folder to adapters.roots, or send its files with register --push" in outside
    assert "ORIGIN_NOT_ALLOWED" in outside
    ended = await asyncio.to_thread(command, *arguments, "--push", "--pin", "--json")
    assert ended.json()["adapter"]["path"] == f"push://{ended.json()['adapter']['digest']}"
    assert ended.json()["adapter"]["pinned"]
    write_shards(folder)
    again = await asyncio.to_thread(command, *arguments, "--push")
    assert "sql@v1 was registered already" in again.out
    (folder / CONFIG).unlink()
    ended = await asyncio.to_thread(command, *arguments, "--push", "--json")
    assert (ended.code, ended.error()["reason"]) == (1, "ORIGIN_UNREADABLE")
    assert f"has no {CONFIG}" in ended.error()["message"]
    for path, words in ((tmp_path / "none", "there is no such folder"), (folder / "README.md", "is not a folder")):
        (folder / "README.md").touch()
        ended = await asyncio.to_thread(command, *arguments[:3], str(path), *arguments[4:], "--push")
        assert (ended.code, f"{path}" in ended.err, words in ended.err) == (1, True, True), ended.err


async def test_a_pushed_adapter_is_served_after_a_restart(tmp_path: Path) -> None:
    """Its source is kept with the data; there is no origin that it could be had from again."""
    folder, data = write_adapter(tmp_path / "sql"), {"data_directory": str(tmp_path / "data")}
    async with running_engine(compute="none") as engine:
        async with serving([engine], **data) as served:

            async def stream() -> AsyncIterator[Any]:
                for request in messages(start_of(folder), chunks_of(folder)):
                    yield request

            await served.adapters.Push(stream())
        async with serving([engine], **data) as served:
            assert (await served.ask("sql", 3)).tokens == served.expected("sql", 3)
