"""Adapters are listed by where they are and by how long nobody has asked for them."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import grpc.aio
import pytest

from sidecar.proto import admin_pb2 as pb
from tests.kit.cli_runs import runner
from tests.kit.emulated import running_engine
from tests.kit.serving import serving, until, write_adapters


async def test_adapters_by_state_and_by_their_last_use(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One is loaded, one only stored, one neither; a request makes its adapter used."""
    loaded, stored, cold = write_adapters(tmp_path, 3)
    async with running_engine(compute="none", shape="tiny") as engine, serving([engine], tmp_path) as served:

        async def listed(**asked: object) -> dict[str, pb.Adapter]:
            page = await served.adapters.List(pb.ListAdaptersRequest(**asked))
            return {adapter.name: adapter for adapter in page.adapters}

        await served.ask(loaded)
        await served.adapters.Prefetch(pb.PrefetchRequest(name=stored))
        await until(lambda: len(served.sidecar.gateway.state.store.entries) == 2)
        await until(lambda: all(each.ready for each in served.sidecar.gateway.state.store.entries.values()))
        for state, name in (("loaded", loaded), ("stored", stored), ("cold", cold)):
            assert [*await listed(state=state)] == [name]
        everything = await listed()
        assert [name for name, adapter in everything.items() if adapter.HasField("unused_s")] == [loaded]
        assert 0 <= everything[loaded].unused_s < 60
        assert [*await listed(unused_s=3600)] == [stored, cold]
        assert [*await listed(unused_s=3600, state="stored")] == [stored]
        assert [*await listed(unused_s=1e-6)] == [loaded, stored, cold]

        for wrong in (math.nan, -1.0, -math.inf):
            with pytest.raises(grpc.aio.AioRpcError, match="it must be a number of seconds"):
                await listed(unused_s=wrong)

        sidecar = runner(capfd)
        options = ("--json", "--admin", str(served.sidecar.admin_address))
        ended = await asyncio.to_thread(sidecar, "adapters", "list", "--state", "cold", *options)
        assert [adapter["name"] for adapter in ended.json()] == [cold]
        ended = await asyncio.to_thread(sidecar, "adapters", "list", "--unused-for", "1h", *options)
        assert [adapter["name"] for adapter in ended.json()] == [stored, cold]
