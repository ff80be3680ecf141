"""Weights that a real Triton reads where they lie: nothing is copied here, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import pytest

from sidecar.adapters.shared_memory import DIRECTORY, PREFIX
from sidecar.core.effects import Load
from sidecar.proto import admin_pb2
from tests.bench.large import FORTY_MB, Size
from tests.e2e.triton.repository import Repository
from tests.e2e.triton.server import TritonServer
from tests.kit.emulated import regions_of
from tests.kit.peft_files import ALL_LINEAR
from tests.kit.serving import serving, until, write_adapters
from tests.kit.sidecar_process import sidecar_process

SMALL = Repository(engine={"compute": "none", "lora_host_pages": 2})
LARGE = {"shape": "llama-3.1-8b", "compute": "none", "lora_host_bytes": 8 << 30, "lora_device_bytes": 8 << 30}
HUGE = Size(ALL_LINEAR, 264)


def files_of(prefix: str) -> set[str]:
    """Return what one sidecar has in shared memory."""
    return {path.name for path in DIRECTORY.glob(f"{prefix}*")}


@pytest.mark.parametrize(
    "killed", ["sidecar", *(pytest.param(killed, marks=pytest.mark.nightly) for killed in ("server", "both"))]
)
async def test_nothing_is_left_after_a_kill_once_the_next_has_started(tmp_path: Path, killed: str) -> None:
    """Files, and regions at the server; and what lives beside it is not disturbed."""
    names = write_adapters(tmp_path / "adapters", 4)
    async with (
        TritonServer(tmp_path / "server", SMALL) as server,
        sidecar_process(server, tmp_path / "adapters") as first,
    ):
        for name in names:
            await first.ask(name)
        regions = await regions_of(server)
        prefix = PREFIX + next(iter(regions)).removeprefix(PREFIX)[:16]
        assert len(regions) == 4
        assert files_of(prefix) == regions | {f"{prefix}.owner"}
        if killed != "sidecar":
            await server.kill()
        if killed != "server":
            await first.kill()
        if killed != "sidecar":
            await server.start()
        async with serving([server], tmp_path / "adapters") as second:
            for name in names:
                assert (await second.ask(name)).tokens == second.expected(name, 4)
            if killed == "server":
                for name in names:
                    await first.ask(name)
                assert files_of(prefix) == regions | {f"{prefix}.owner"}
                assert regions < await regions_of(server)
            else:
                assert files_of(prefix) == set()
                assert not await regions_of(server) & regions
            assert len(await regions_of(server)) == (8 if killed == "server" else 4)
        assert await regions_of(server) == (regions if killed == "server" else set())


@pytest.mark.nightly
async def test_the_memory_tier_is_the_region(tmp_path: Path) -> None:
    """Six adapters of 40 MB: shared memory grows by them, this process's own hardly does."""
    for seed in range(6):
        FORTY_MB.write(tmp_path / "adapters" / f"a{seed}", seed)
    async with (
        TritonServer(tmp_path / "server", Repository(engine=LARGE)) as server,
        sidecar_process(server, tmp_path / "adapters") as sidecar,
    ):
        await sidecar.ask("a0")
        anonymous = sidecar.memory_bytes("RssAnon")
        for seed in range(1, 6):
            await sidecar.ask(f"a{seed}")
        grown = sidecar.memory_bytes("RssAnon") - anonymous
        kept = sum((DIRECTORY / name).stat().st_size for name in await regions_of(server))
    assert kept == 6 * FORTY_MB.size_bytes
    assert grown < kept / 10


@pytest.mark.nightly
async def test_an_adapter_over_the_message_cap(tmp_path: Path) -> None:
    """2.1 GB packed: by gRPC refused with the number and the way out, by shared memory loaded."""
    assert HUGE.size_bytes > 2**31
    HUGE.write(tmp_path / "adapters" / "huge", 0)
    engine = {**LARGE, "max_lora_rank": HUGE.rank, "lora_max_rank_cached": HUGE.rank}
    async with TritonServer(tmp_path / "server", Repository(engine=engine)) as server:
        async with serving([server], tmp_path / "adapters", backend={"weights_transport": "grpc"}) as served:
            request = admin_pb2.RegisterRequest(name="huge", path=str(tmp_path / "adapters" / "huge"))
            with pytest.raises(grpc.aio.AioRpcError, match=rf"takes {HUGE.size_bytes} bytes.*shared_memory"):
                await served.adapters.Register(request)
            assert not served.state.names
        store = {"memory_bytes": 3 << 30}
        async with serving([server], tmp_path / "adapters", store=store) as served:
            assert (await served.ask("huge")).tokens == served.expected("huge", 4)
            assert served.recorder.count(Load) == 1
            await until(lambda: not served.sidecar.gateway.state.loads)
