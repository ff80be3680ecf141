"""Weights that engines read where they lie: how that is found out, and the life of a region."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from tritonclient.grpc import service_pb2

from sidecar.adapters.shared_memory import DIRECTORY, Mount
from sidecar.backends.triton import kind, transport
from sidecar.config import parse
from sidecar.core.effects import Heal, Load
from sidecar.core.facts import EngineFacts
from sidecar.errors import Misused
from sidecar.lab.engine.kserve import shared_memory
from sidecar.proto import admin_pb2
from sidecar.serve.app import Sidecar
from sidecar.shell.store import PackedWeights
from tests.kit.emulated import EngineProcess, channel_to, regions_of, running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.sidecar_process import sidecar_process

DUMMY = {"compute": "none", "shape": "tiny"}


async def unregister_all(engine: Any) -> None:
    async with channel_to(engine.grpc_address) as stub:
        await stub.SystemSharedMemoryUnregister(service_pb2.SystemSharedMemoryUnregisterRequest())


def blobs_of(served: Serving) -> set[str]:
    """Return the names of the files that a sidecar keeps in shared memory."""
    mount = served.sidecar.gateway.store._regions.mount
    assert mount is not None
    return {path.name for path in DIRECTORY.glob(f"{mount.prefix}*")}


async def size_of_a_blob(engine: Any, folder: Path, name: str) -> int:
    """Return the bytes that one adapter takes in shared memory."""
    async with serving([engine], folder) as served:
        await served.ask(name)
        (blob,) = blobs_of(served)
        return (DIRECTORY / blob).stat().st_size


def detail_of(served: Serving) -> str:
    return served.sidecar.gateway.backends["trt-0"].detail()


async def test_weights_are_named_and_regions_are_unregistered_before_their_files_go(tmp_path: Path) -> None:
    """`auto` finds the shared mount. A dropped blob leaves the engine first; its file serves the next, renamed."""
    names = write_adapters(tmp_path, 4)
    async with running_engine(**DUMMY) as engine:
        async with serving([engine], tmp_path) as served:
            assert "weights by shared memory" in detail_of(served)
            for name in names[:3]:
                assert (await served.ask(name)).tokens == served.expected(name, 4)
            assert await regions_of(engine) == blobs_of(served)
            assert len(blobs_of(served)) == 3
            with_files: list[bool] = []
            unregister = served.sidecar.gateway.backends["trt-0"]._transport._shared._unregister  # type: ignore[attr-defined]

            async def watched(name: str) -> None:
                with_files.append((DIRECTORY / name).exists())
                await unregister(name)

            served.sidecar.gateway.backends["trt-0"]._transport._shared._unregister = watched  # type: ignore[attr-defined]
            await served.adapters.Evict(admin_pb2.AdapterRequest(name=names[0]))
            await until(lambda: bool(with_files))
            assert with_files == [True]
            before = blobs_of(served)
            (spare,) = before - await regions_of(engine)
            assert (await served.ask(names[3])).tokens == served.expected(names[3], 4)
            assert len(blobs_of(served) - before) == 1
            assert before - blobs_of(served) == {spare}
            prefix = served.sidecar.gateway.store._regions.mount.prefix  # type: ignore[union-attr]
        assert await regions_of(engine) == set()
        assert not list(DIRECTORY.glob(f"{prefix[:-1]}*"))


async def test_grpc_is_used_where_it_is_configured(tmp_path: Path) -> None:
    (name,) = write_adapters(tmp_path, 1)
    backend = {"weights_transport": "grpc"}
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path, backend=backend) as served:
        assert (await served.ask(name)).tokens == served.expected(name, 4)
        assert "weights by gRPC, as configured" in detail_of(served)
        assert await regions_of(engine) == set()
        assert served.sidecar.gateway.store._regions.mount is None


async def test_an_engine_with_another_mount_is_sent_the_weights_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe names a file that only our mount has."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(shared_memory, "DIRECTORY", tmp_path / "elsewhere")
    (name,) = write_adapters(tmp_path / "adapters", 1)
    async with running_engine(**DUMMY) as engine, serving([engine], tmp_path / "adapters") as served:
        assert (await served.ask(name)).tokens == served.expected(name, 4)
        detail = detail_of(served)
        assert "weights by gRPC: Unable to open shared memory region" in detail
        assert await regions_of(engine) == set()


async def test_an_engine_with_another_mount_stays_down_where_shared_memory_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "DIRECTORY", tmp_path)
    async with running_engine(**DUMMY) as engine:
        free = {"address": "127.0.0.1:0"}
        backend = {"url": f"triton://{engine.grpc_address}", "id": "trt-0", "weights_transport": "shared_memory"}
        listeners = {"data": free, "admin": free, "http": free}
        sidecar = await Sidecar.start(parse({"backends": [backend], "listeners": listeners}, "the test"))
        try:
            await until(lambda: "no shared memory" in sidecar.gateway.backends["trt-0"].detail())
            assert "one /dev/shm" in sidecar.gateway.backends["trt-0"].detail()
            assert not sidecar.gateway.state.backends["trt-0"].takes_requests
        finally:
            await sidecar.stop()


@pytest.mark.parametrize("wanted", ["auto", "shared_memory"])
async def test_a_mount_that_is_too_small_is_told_before_the_first_request(tmp_path: Path, wanted: str) -> None:
    (name,) = write_adapters(tmp_path, 1)
    store, backend = {"memory_bytes": 1 << 60}, {"weights_transport": wanted}
    async with running_engine(**DUMMY) as engine:
        if wanted == "auto":
            async with serving([engine], tmp_path, store=store, backend=backend) as served:
                assert (await served.ask(name)).tokens == served.expected(name, 4)
                detail = detail_of(served)
                assert "weights by gRPC: /dev/shm has " in detail
                assert "--shm-size" in detail
            return
        with pytest.raises(Misused, match=r"weights_transport: shared_memory: /dev/shm has \d+ bytes free"):
            async with serving([engine], tmp_path, store=store, backend=backend):
                pass


async def test_a_region_that_the_server_forgot_is_registered_again(tmp_path: Path) -> None:
    """Behind our back all regions go; the next Load meets that, and its client does not."""
    names = write_adapters(tmp_path, 4)
    async with running_engine(**DUMMY, lora_host_pages=2) as engine, serving([engine], tmp_path) as served:
        for name in names:
            await served.ask(name)
        await unregister_all(engine)
        for name in names:
            assert (await served.ask(name)).tokens == served.expected(name, 4)
        assert await regions_of(engine) == blobs_of(served)


async def test_a_server_that_was_restarted_is_registered_with_anew(tmp_path: Path) -> None:
    names = write_adapters(tmp_path, 2)
    async with EngineProcess("--compute", "none") as engine, serving([engine], tmp_path) as served:
        for name in names:
            await served.ask(name)
        await engine.kill()
        await engine.start()
        for name in names:
            assert (await served.ask(name)).tokens == served.expected(name, 4)
        assert await regions_of(engine) == blobs_of(served)


def size_of(path: Path) -> int:
    """Return a file's size, 0 when it has just gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


async def test_the_budget_is_never_exceeded_however_slowly_engines_let_go(tmp_path: Path) -> None:
    """Room for two blobs, eight adapters in turn: a new one is not made before an old one's bytes are back."""
    names = write_adapters(tmp_path, 8)
    async with running_engine(**DUMMY) as engine:
        size = await size_of_a_blob(engine, tmp_path, names[0])
        store = {"memory_bytes": 2 * size}
        async with serving([engine], tmp_path, store=store) as served:
            shared: Any = served.sidecar.gateway.backends["trt-0"]._transport._shared  # type: ignore[attr-defined]
            unregister, held = shared._unregister, []

            async def slowly(name: str) -> None:
                for _ in range(20):
                    held.append(sum(size_of(DIRECTORY / path) for path in blobs_of(served)))
                    await asyncio.sleep(0)
                await unregister(name)

            shared._unregister = slowly
            for _ in range(3):
                answers = await asyncio.gather(*(served.ask(name) for name in names))
                for name, answer in zip(names, answers, strict=True):
                    assert answer.tokens == served.expected(name, 4)
            assert max(held) == 2 * size


@pytest.mark.parametrize("settled", [True, False])
async def test_in_a_full_store_the_next_adapter_gets_the_last_ones_memory(
    tmp_path: Path, settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a load of the last one had no answer: then the engine may still read it, and its memory goes."""
    names, made = write_adapters(tmp_path, 5), 0
    create = Mount.create

    def counted(self: Mount) -> tuple[int, Path]:
        nonlocal made
        made += 1
        return create(self)

    monkeypatch.setattr(Mount, "create", counted)
    async with running_engine(**DUMMY) as engine:
        size = await size_of_a_blob(engine, tmp_path, names[0])
        async with serving([engine], tmp_path, store={"memory_bytes": size}) as served:
            if not settled:
                release = PackedWeights.release
                monkeypatch.setattr(PackedWeights, "release", lambda self, settled=False: release(self))
            made = 0
            for name in names:
                assert (await served.ask(name)).tokens == served.expected(name, 4)
            assert made == (1 if settled else len(names))
            assert len(blobs_of(served)) == 1


async def test_what_cannot_be_unregistered_goes_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its bytes are given back: else requests would wait for them for ever."""
    names = write_adapters(tmp_path, 4)
    async with running_engine(**DUMMY) as engine:
        size = await size_of_a_blob(engine, tmp_path, names[0])
        async with serving([engine], tmp_path, store={"memory_bytes": size}) as served:

            async def fails(name: str) -> None:
                raise RuntimeError("no such luck")

            shared: Any = served.sidecar.gateway.backends["trt-0"]._transport._shared  # type: ignore[attr-defined]
            unregister, shared._unregister = shared._unregister, fails
            for name in names:
                assert (await served.ask(name)).tokens == served.expected(name, 4)
            shared._unregister = unregister
    assert "an engine may still refer to" in caplog.text


async def test_two_sidecars_on_one_mount_one_of_them_killed(tmp_path: Path) -> None:
    """The other's regions stay, and the next start removes the dead one's files, and its regions at the server."""
    names = write_adapters(tmp_path, 3)
    async with running_engine(**DUMMY, lora_host_pages=2) as engine, serving([engine], tmp_path) as served:
        for name in names:
            await served.ask(name)
        mine = blobs_of(served)
        async with sidecar_process(engine, tmp_path) as other:
            for name in names:
                await other.ask(name)
            others = await regions_of(engine) - mine
            assert len(others) == 3
            await other.kill()
        for name in names:
            assert (await served.ask(name)).tokens == served.expected(name, 4)
        assert await regions_of(engine) == mine | others
        async with serving([engine], tmp_path) as third:
            assert await regions_of(engine) == mine
            assert not any((DIRECTORY / name).exists() for name in others)
            for name in names:
                assert (await third.ask(name)).tokens == served.expected(name, 4)
                assert (await served.ask(name)).tokens == served.expected(name, 4)
        assert await regions_of(engine) == mine


async def test_several_caches_behind_one_address_get_the_weights_with_every_request(tmp_path: Path) -> None:
    """Nobody can say which cache a request meets: its weights are named in it, and nothing is ever missing."""
    names = write_adapters(tmp_path, 12)
    async with running_engine(**DUMMY, instances=4, lora_host_pages=3) as engine, serving([engine], tmp_path) as served:
        assert "CACHES 4, not addressable" in detail_of(served)
        asked = [name for name in names for _ in range(10)]
        answers = await asyncio.gather(*(served.ask(name) for name in asked))
        for name, answer in zip(asked, answers, strict=True):
            assert answer.tokens == served.expected(name, 4)
        assert served.recorder.count(Load) == 0
        assert Counter(effect.reason for effect in served.recorder.of(Heal))["engine_miss"] == 0
        assert (await served.ask("", tokens=3)).tokens == served.expected("", 3)


async def test_several_caches_by_grpc_answer_after_some_misses(tmp_path: Path) -> None:
    """Without shared memory each cache has to be met once; the operator is told how to do better."""
    names = write_adapters(tmp_path, 3)
    backend = {"weights_transport": "grpc"}
    async with (
        running_engine(**DUMMY, instances=3) as engine,
        serving([engine], tmp_path, [tmp_path], backend=backend) as served,
    ):
        detail = detail_of(served)
        assert "CACHES 3, not addressable" in detail
        assert "set instance_group count to 1" in detail
        request = admin_pb2.RegisterRequest(name="other", path=str(tmp_path / names[0]))
        assert "3 adapter caches" in (await served.adapters.Register(request)).warnings[0]
        asked = [name for name in names for _ in range(5)]
        answers = await asyncio.gather(*(served.ask(name) for name in asked))
        for name, answer in zip(asked, answers, strict=True):
            assert answer.tokens == served.expected(name, 4)


async def test_weights_go_along_in_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they do after many misses: the engine is given every adapter by the requests themselves."""
    names = write_adapters(tmp_path, 3)
    monkeypatch.setattr(EngineFacts, "attaches", True)
    backend = {"weights_transport": "grpc"}
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, [tmp_path], backend=backend) as served,
    ):
        for name in names * 2:
            assert (await served.ask(name)).tokens == served.expected(name, 4)
        assert served.recorder.count(Load) == 0
        assert served.recorder.count(Heal) == 0


async def test_an_adapter_over_the_message_cap_goes_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By gRPC it is refused with the number and the way out; by reference its size is no matter."""
    for module in (kind, transport):
        monkeypatch.setattr(module, "MESSAGE_BYTES_MAX", (1 << 16) + 1000)
    write_adapter(tmp_path / "big", seed=1)
    async with running_engine(**DUMMY) as engine:
        async with serving([engine], tmp_path) as served:
            assert (await served.ask("big")).tokens == served.expected("big", 4)
        backend = {"weights_transport": "grpc"}
        async with serving([engine], tmp_path, backend=backend) as served:
            assert not served.state.names
            with pytest.raises(grpc.aio.AioRpcError, match="weights_transport: shared_memory"):
                await served.adapters.Register(admin_pb2.RegisterRequest(name="big", path=str(tmp_path / "big")))
