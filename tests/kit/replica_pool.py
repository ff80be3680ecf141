"""Several sidecars in the test's event loop, in front of the same engines, sharing a real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from sidecar.config import parse
from sidecar.serve.app import Sidecar
from tests.kit.serving import Recorder, Serving, place_of, until

LEASE_S = 1.0
CALM_S = 3.0
"""A lease duration for tests in which no lease may expire on a busy machine; a pool takes that long to begin."""
FREE = {"address": "127.0.0.1:0"}


@asynccontextmanager
async def replica(
    number: int, url: str, engines: Sequence[Any], adapters: Path, **record: Any
) -> AsyncIterator[Serving]:
    """Run one replica for a block. It owns nothing yet when the block begins, and ends as if killed.

    `record` is configuration, except `lease_s`; its `backend` (a dict) goes into every backend's entry.
    """
    lease_s, backend = record.pop("lease_s", LEASE_S), record.pop("backend", {})
    config = {
        "backends": [place_of(engine, at) | {"id": f"b{at}"} | backend for at, engine in enumerate(engines)],
        "listeners": {"data": FREE, "admin": FREE, "http": FREE},
        "adapters": {"serve": str(adapters), "roots": [str(adapters)]},
        "state": {"url": url},
        "replicas": {"address": "127.0.0.1:0", "name": f"r{number}", "lease_s": lease_s},
    }
    sidecar = await Sidecar.start(parse(config | record, "the test"))
    recorder = Recorder()
    sidecar.gateway.observe(recorder)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(sidecar.stop)
        data = await stack.enter_async_context(grpc.aio.insecure_channel(sidecar.data_address))
        admin = await stack.enter_async_context(grpc.aio.insecure_channel(sidecar.admin_address))
        yield Serving(sidecar, recorder, data, admin)


@asynccontextmanager
async def replicas(
    count: int, url: str, engines: Sequence[Any], adapters: Path, **record: Any
) -> AsyncIterator[list[Serving]]:
    """Run replicas for the length of a block, which begins when all know the owner of each backend."""
    async with AsyncExitStack() as stack:
        pool = [
            await stack.enter_async_context(replica(number, url, engines, adapters, **record))
            for number in range(count)
        ]
        await until(lambda: settled(pool))
        yield pool


def owned(served: Serving) -> set[str]:
    """Return the backends that a replica serves."""
    return {backend.id for backend in served.state.backends.values() if backend.takes_requests}


def settled(pool: Sequence[Serving]) -> bool:
    """Return True if one replica serves each backend, and all replicas know which."""
    owners = {backend: served.sidecar.replica.member.id for served in pool for backend in owned(served)}
    return set(owners) == set(pool[0].state.backends) and all(
        served.sidecar.replica.board.owner_of(backend) == owner for served in pool for backend, owner in owners.items()
    )


def leader_of(pool: list[Serving]) -> Serving | None:
    return next((served for served in pool if served.sidecar.replica.keeper.leads_since is not None), None)


async def the_leader(pool: list[Serving]) -> Serving:
    """Wait until one leads."""
    await until(lambda: leader_of(pool) is not None)
    leader = leader_of(pool)
    assert leader is not None
    return leader
