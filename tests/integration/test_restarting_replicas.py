"""Several replicas restart the engines that they own, one at a time as far as they know of each other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.integration.test_restarting import ASKING, LIMIT, Pool
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, owned, replicas
from tests.kit.serving import Serving, until, write_adapters
from tests.kit.trtllm_emulated import TrtllmProcess
from tests.kit.trtllm_served import entry_of

SLOTS = ("--max-loras", "4", "--max-cpu-loras", "8", "--compute", "none", "--iteration-stats")


def owner(pool: list[Serving], backend: str) -> Serving:
    return next(served for served in pool if backend in owned(served) or served.sidecar.restarts.at == backend)


@asynccontextmanager
async def three_replicas(tmp_path: Path, backend: dict[str, Any]) -> AsyncIterator[tuple[list[Serving], Pool]]:
    """Run three replicas before two engines. The first owns none by its name; steps are loaded through it."""
    folder = tmp_path / "adapters"
    write_adapters(folder, 2)
    async with (
        running(tmp_path / "redis") as redis,
        TrtllmProcess(*SLOTS) as one,
        TrtllmProcess(*SLOTS) as two,
        replicas(
            3, redis.url, [one, two], folder, backend=backend, lease_s=CALM_S, openai={"load_calls": True}
        ) as pool,
    ):
        (folder / "steps").mkdir()
        made = Pool(folder, {"b0": one, "b1": two}, {"b0": [], "b1": []})
        made.served = pool[0]
        yield pool, made


async def test_engines_of_two_replicas_go_one_at_a_time(tmp_path: Path) -> None:
    """Each tells the other what it restarts, and sees by the other's word that its engine serves meanwhile."""
    backend = entry_of(tmp_path, 4, 8) | {
        "host_versions_max": LIMIT,
        "host_versions_on_limit": "drain",
        "restart": {"command": ["sh", "-c", ASKING, str(tmp_path / "adapters")]},
    }
    async with three_replicas(tmp_path, backend) as (pool, made):
        # By their names; the first replica owns none.
        assert [owned(served) for served in pool] == [set(), {"b0"}, {"b1"}]

        def is_full(backend: str) -> bool:
            wear = owner(pool, backend).sidecar.gateway.backends[backend].wear
            return wear is not None and wear.versions >= LIMIT

        step = 0
        while not all(is_full(backend) for backend in made.engines):
            step += 1
            await made.load(step)
        restarted = []
        while len(restarted) < 2:
            backend = await made.asked()
            (other,) = set(made.engines) - {backend}
            here, there = owner(pool, backend), owner(pool, other)
            assert here is not there
            assert other in owned(there)
            for served in pool:
                told = set() if served is here else {backend}
                await until(lambda of=served, told=told: of.sidecar.replica.restarted_elsewhere() == told)  # type: ignore[misc]
            await made.restart(backend)
            await until(lambda served=here: served.sidecar.restarts.at is None)  # type: ignore[misc]
            restarted.append(backend)
        assert sorted(restarted) == ["b0", "b1"]
        assert (await pool[0].ask("a00")).tokens == (await pool[1].ask("a00")).tokens


async def test_the_next_owner_of_an_engine_counts_on(tmp_path: Path) -> None:
    """An engine has what its last owner gave it; the probes, which each owner gives it, may be counted twice."""
    backend = entry_of(tmp_path, 4, 8) | {"host_versions_max": LIMIT}
    async with three_replicas(tmp_path, backend) as (pool, made):
        for step in range(5):
            await made.load(step)
        await made.note("b0")
        first = owner(pool, "b0")
        left = [served for served in pool if served is not first]
        await until(
            lambda: all(served.sidecar.replica.board.versions_kept("b0") == made.ids["b0"][0] for served in left)
        )
        await first.sidecar.drain()
        await until(lambda: any("b0" in owned(served) for served in left))
        # A load goes to no engine that is down by what the replica has heard that is asked for it.
        await until(lambda: all(served.sidecar.gateway.serves("b0") for served in left))
        backend = owner(left, "b0").sidecar.gateway.backends["b0"]
        assert made.ids["b0"][0] <= backend.wear.versions < 2 * made.ids["b0"][0]
        await made.load(5)
        await made.note("b0")
        assert made.ids["b0"][0] < made.ids["b0"][1] <= backend.wear.versions
