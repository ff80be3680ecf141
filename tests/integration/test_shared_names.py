"""Two whole sidecars that share their names: what one is told, both serve."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from sidecar.proto import admin_pb2 as pb
from tests.kit.emulated import running_engine
from tests.kit.peft_files import write_adapter
from tests.kit.redis_servers import Server, cuttable, running
from tests.kit.serving import Serving, serving, until

DUMMY = {"compute": "none", "shape": "tiny"}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with running(tmp_path / "server") as server:
        yield server


@asynccontextmanager
async def two_sidecars(folder: Path, *urls: str) -> AsyncIterator[list[Serving]]:
    """Run two sidecars in front of one engine, each with its URL of the shared state."""
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(running_engine(**DUMMY))
        yield [await stack.enter_async_context(serving([engine], roots=[folder], state={"url": url})) for url in urls]


async def register(served: Serving, path: Path, name: str = "sql") -> str:
    """Register a folder; return the version that it became."""
    return str((await served.adapters.Register(pb.RegisterRequest(name=name, path=str(path)))).version)


async def test_a_name_of_one_is_a_name_of_both(server: Server, tmp_path: Path) -> None:
    """Registered, promoted, pinned and forgotten on one, it is so on the other; a watcher there is told of each."""
    paths = [write_adapter(tmp_path / f"v{seed}", seed=seed) for seed in range(2)]
    async with two_sidecars(tmp_path, server.url, server.url) as (one, two):
        watching = two.adapters.Watch(pb.WatchRequest())
        assert await register(one, paths[0]) == "v1"
        first = await watching.read()
        assert (first.name, first.adapter.version) == ("sql", "sql@v1")
        assert (await two.ask("sql", 4)).tokens == two.expected("sql", 4)
        assert await register(two, paths[1]) == "v2"
        assert (await watching.read()).adapter.version == "sql@v2"
        await until(lambda: one.state.names["sql"].current == 2)
        await one.adapters.Promote(pb.PromoteRequest(name="sql", version="v1"))
        await one.adapters.Pin(pb.AdapterRequest(name="sql"))
        assert (await watching.read()).adapter.version == "sql@v1"
        last = await watching.read()
        assert last.adapter.pinned
        watching.cancel()
        await one.adapters.Unregister(pb.UnregisterRequest(name="sql"))
        await until(lambda: "sql" not in two.state.names)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await two.ask("sql")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        resumed = two.adapters.Watch(pb.WatchRequest(token=last.token))
        gone = await resumed.read()
        assert (gone.name, gone.HasField("adapter")) == ("sql", False)
        resumed.cancel()


async def test_registrations_of_one_name_at_once_are_all_kept(server: Server, tmp_path: Path) -> None:
    """Eight contents registered by two sidecars at the same moment become eight versions, the same on both."""
    paths = [write_adapter(tmp_path / f"v{seed}", seed=seed) for seed in range(8)]
    async with two_sidecars(tmp_path, server.url, server.url) as both:
        given = await asyncio.gather(*(register(both[seed % 2], path) for seed, path in enumerate(paths)))
        assert sorted(given) == [f"v{ordinal}" for ordinal in range(1, 9)]
        records = [served.sidecar.registry.get("sql") for served in both]
        await until(lambda: both[0].sidecar.registry.last_change == both[1].sidecar.registry.last_change == 8)
        assert records[0] is not None
        assert both[0].sidecar.registry.all() == both[1].sidecar.registry.all()


async def test_without_redis_names_are_served_and_not_changed(server: Server, tmp_path: Path) -> None:
    """A sidecar that cannot reach Redis goes on with the names it knows and says what a registration needs."""
    paths = [write_adapter(tmp_path / f"v{seed}", seed=seed) for seed in range(2)]
    async with cuttable(server) as proxy, two_sidecars(tmp_path, proxy.url, server.url) as (one, two):
        await register(one, paths[0])
        await proxy.cut()
        registry = one.sidecar.registry
        await until(lambda: registry.away_since is not None)  # type: ignore[attr-defined]
        assert (await one.ask("sql", 4)).tokens == one.expected("sql", 4)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await register(one, paths[1])
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "needs Redis at" in (caught.value.details() or "")
        await register(two, paths[1])
        await proxy.mend()
        await until(lambda: one.state.names["sql"].current == 2)
        assert (await one.ask("sql", 4)).tokens == two.expected("sql", 4)
