"""Declared adapters with several replicas: one reconciles, all answer, and the next one goes on where it was."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.kubernetes.pauses import Pauses
from sidecar.proto import admin_pb2 as pb
from tests.kit.emulated import running_engine
from tests.kit.forked import python
from tests.kit.kubernetes_cluster import Cluster, cluster, on_clusters
from tests.kit.peft_files import write_adapter
from tests.kit.redis_servers import running
from tests.kit.replica_pool import replica, settled, the_leader
from tests.kit.serving import Serving, place_of, until
from tests.kit.sidecar_process import SERVE, SidecarProcess

DUMMY = {"compute": "none", "shape": "tiny"}
LORAS = "loraadapters"
LEASE_S = 3.0
"""Long enough that a busy machine does not change the leader by itself."""
BOTH = {"config_maps": True, "custom_resources": True}


@asynccontextmanager
async def pool_of(
    count: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Cluster, list[Serving], list[AsyncExitStack], Path]]:
    """Run replicas that follow a cluster; each has a stack of its own, which ends it as if it were killed."""
    folder = tmp_path / "adapters"
    write_adapter(folder / "served", seed=99)
    for part in ("reconciler.LOOK_S", "declared.LOOK_S", "reporting.COUNTS_EVERY_S"):
        monkeypatch.setattr(f"sidecar.kubernetes.{part}", 0.2)
    monkeypatch.setattr("sidecar.kubernetes.mirror.Pauses", partial(Pauses, 0.02, 0.2))
    async with (
        cluster(kind) as home,
        running(tmp_path / "redis") as redis,
        running_engine(**DUMMY) as one,
        running_engine(**DUMMY) as two,
        AsyncExitStack() as stack,
    ):
        monkeypatch.setenv("KUBECONFIG", str(await home.kubeconfig(tmp_path)))
        wanted = {"namespace": home.namespace, "adapters": BOTH}
        pool, stacks = [], []
        for number in range(count):
            own = await stack.enter_async_context(AsyncExitStack())
            lasting = {"address": "127.0.0.1:0", "name": f"r{number}", "lease_s": LEASE_S}
            made = replica(number, redis.url, [one, two], folder, kubernetes=wanted, replicas=lasting)
            pool.append(await own.enter_async_context(made))
            stacks.append(own)
        await until(lambda: settled(pool))
        await the_leader(pool)
        yield home, pool, stacks, folder


async def reaches(home: Cluster, name: str, phase: str, **fields: Any) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            status: dict[str, Any] = (await home.get(LORAS, name)).get("status") or {}
            if status.get("phase") == phase and all(status.get(key) == value for key, value in fields.items()):
                return status
            await asyncio.sleep(0.02)


async def all_answer(pool: list[Serving], name: str, digest: str) -> None:
    """Ask every replica; every answer must be of that content."""
    for answer in await asyncio.gather(*(served.ask(name, 3) for served in pool for _ in range(4))):
        assert [origin.digest for origin in answer.origins] == [digest]


@on_clusters
async def test_one_reconciles_and_all_answer(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change is made and told once; from Ready on every replica answers with the new weights, and no other."""
    async with pool_of(3, kind, tmp_path, monkeypatch) as (home, pool, _, folder):
        registry = pool[0].sidecar.registry
        before = registry.last_change
        for seed in range(3):
            await home.declare(f"a{seed}", write_adapter(folder / f"a{seed}", seed=seed))
        for seed in range(3):
            await all_answer(pool, f"a{seed}", (await reaches(home, f"a{seed}", "Ready"))["digest"])
        assert registry.last_change == before + 3
        for seed in range(10, 14):
            path = write_adapter(folder / f"v{seed}", seed=seed)
            await home.patch(LORAS, "a0", {"spec": {"source": str(path)}})
            status = await reaches(home, "a0", "Ready", version=f"v{seed - 8}")
            await all_answer(pool, "a0", status["digest"])
        assert registry.last_change == before + 3 + 4
        leader = await the_leader(pool)
        assert [served for served in pool if served.sidecar._declared.phases] == [leader]
        await home.tells(*["Registered"] * 7)


@on_clusters
async def test_a_hold_and_a_grace_outlive_their_leader(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the registry: the next leader keeps to them, tells nothing twice, and ends them in time."""
    async with pool_of(3, kind, tmp_path, monkeypatch) as (home, pool, stacks, folder):
        one, two = (write_adapter(folder / f"v{seed}", seed=seed) for seed in (1, 2))
        await home.declare("sql", one, removal={"graceSeconds": 3600})
        await home.declare("gone", one, removal={"graceSeconds": 3600})
        await reaches(home, "gone", "Ready")
        first = await reaches(home, "sql", "Ready", version="v1")
        await home.patch(LORAS, "sql", {"spec": {"source": str(two)}})
        second = await reaches(home, "sql", "Ready", version="v2")
        await pool[0].adapters.Rollback(pb.RollbackRequest(name="sql", hold_s=3600))
        await reaches(home, "sql", "Held", version="v1")
        await home.delete(LORAS, "gone")
        await until(lambda: pool[0].sidecar.registry.get("gone").declared.gone_at > 0)
        leader = await the_leader(pool)
        left = [served for served in pool if served is not leader]
        await stacks[pool.index(leader)].aclose()
        next_leader = await the_leader(left)
        await until(lambda: next_leader.sidecar._declared.phases == {"Held": 1, "Removing": 1})
        await until(lambda: settled(left))
        await all_answer(left, "sql", first["digest"])
        assert left[0].sidecar.registry.get("gone") is not None
        await left[1].adapters.Promote(pb.PromoteRequest(name="sql", version="v1", hold_s=1))
        await reaches(home, "sql", "Ready", version="v2")
        await all_answer(left, "sql", second["digest"])
        await home.tells(*["Registered"] * 4, "Held", "Removing")


@on_clusters
async def test_a_leader_that_is_lost_in_the_middle_is_followed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had begun is done by the next one, to the end, for every name."""
    async with pool_of(2, kind, tmp_path, monkeypatch) as (home, pool, stacks, folder):
        for seed in range(8):
            await home.declare(f"a{seed}", write_adapter(folder / f"a{seed}", seed=seed))
        leader = await the_leader(pool)
        await until(lambda: len(leader.sidecar.registry.all()) > 2)
        (left,) = [served for served in pool if served is not leader]
        await stacks[pool.index(leader)].aclose()
        for seed in range(8):
            status = await reaches(home, f"a{seed}", "Ready")
            await until(lambda: settled([left]))
            await all_answer([left], f"a{seed}", status["digest"])


# One process that is killed.


@asynccontextmanager
async def process_of(engine: Any, folder: Path, home: Cluster, kubeconfig: Path) -> AsyncIterator[SidecarProcess]:
    """Run a sidecar that follows a cluster in a process of its own, with names kept in `folder`."""
    free = {"address": "127.0.0.1:0"}
    config = {
        "backends": [place_of(engine, 0)],
        "listeners": {"data": free, "admin": free, "http": free},
        "adapters": {"roots": [str(folder)]},
        "data_directory": str(folder / "data"),
        "kubernetes": {"namespace": home.namespace, "adapters": BOTH},
    }
    environment = os.environ | {"KUBECONFIG": str(kubeconfig)}
    process = await python("-c", SERVE, json.dumps(config), "0", stdout=asyncio.subprocess.PIPE, env=environment)
    assert process.stdout is not None
    try:
        yield SidecarProcess(process, *(await process.stdout.readline()).decode().split())
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        process.close()


async def refusal(process: SidecarProcess, name: str) -> grpc.StatusCode | None:
    """Return the code that a request by a name is refused with, None if it is answered."""
    try:
        await process.ask(name)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return None


@pytest.mark.slow
@on_clusters
async def test_a_process_that_is_killed_comes_back_to_what_is_declared_by_then(kind: str, tmp_path: Path) -> None:
    """Names answer at once, before the cluster is asked; what has changed or gone meanwhile is made so."""
    (tmp_path / "data").mkdir()
    paths = [str(write_adapter(tmp_path / f"v{seed}", seed=seed)) for seed in range(3)]
    async with cluster(kind) as home, running_engine(**DUMMY) as engine:
        kubeconfig = await home.kubeconfig(tmp_path)
        async with process_of(engine, tmp_path, home, kubeconfig) as before:
            for name, path in zip(("sql", "stays", "goes"), paths, strict=True):
                await home.declare(name, path, removal={"graceSeconds": 0})
                await reaches(home, name, "Ready")
            tokens = {name: await before.ask(name) for name in ("sql", "stays", "goes")}
            await before.kill()
        await home.patch(LORAS, "sql", {"spec": {"source": paths[1]}})
        await home.delete(LORAS, "goes")
        if home.server is not None:
            await home.server.stop()
        async with process_of(engine, tmp_path, home, kubeconfig) as after:
            if home.server is not None:
                assert await after.ask("sql") == tokens["sql"]
                assert await after.ask("goes") == tokens["goes"]
                await home.server.start()
            await reaches(home, "sql", "Ready", version="v2")
            assert await after.ask("sql") == tokens["stays"] == await after.ask("stays")
            async with asyncio.timeout(60):
                while await refusal(after, "goes") is None:
                    await asyncio.sleep(0.02)
            assert await refusal(after, "goes") is grpc.StatusCode.NOT_FOUND
        await home.tells(*["Registered"] * 4, "Removed")
