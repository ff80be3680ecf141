"""Real Tritons that die, freeze, come back and change their models, under load and idle.

Whatever happens: a client gets its adapter's tokens, once and to one end; one whose answer had begun is told soon that
it broke off; one whose answer had not begun is answered when there is somebody to do it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from sidecar.backends.probe import PROBE_ID
from sidecar.core.words import Phase
from tests.e2e.triton.loads import ENGINE, Clients, back, detail_has, losses, outcomes, servers, told_of
from tests.e2e.triton.repository import Repository
from tests.e2e.triton.server import TritonServer
from tests.emulated import channel_to
from tests.faults import assert_broken_off, assert_nothing_left, assert_right, attempt
from tests.serving import Serving, serving, until, write_adapters

SLOW = {"time_scale": 0.5}
"""An answer of 30 tokens takes some tenths of a second: there are always some under way."""
FACTS = {"progress_timeout_s": 2.0}
NO_METRICS = FACTS | {"metrics": None}
SOON_S = 20.0
"""Within this a client whose answer had begun is told; it takes a little over the progress timeout."""
CORE = "tensorrt_llm"


async def verb(server: TritonServer, name: str, model: str = CORE) -> None:
    """Have a server load or unload a model: the reply comes when it takes requests, or takes no more."""
    async with channel_to(server.grpc_address) as stub:
        request = getattr(service_pb2, f"RepositoryModel{name}Request")(model_name=model)
        await getattr(stub, f"RepositoryModel{name}")(request)


async def reload(server: TritonServer) -> None:
    await verb(server, "Unload")
    await verb(server, "Load")


# Under load, again and again.


async def rounds(
    served: Serving, clients: Clients, break_it: Callable[[], Any], words: str, mend: Callable[[], Any]
) -> None:
    """Break and mend a server three times under load, and let all clients come to their end.

    While it is out, those whose answers had begun are told, and `backends list` says why.
    """
    for _ in range(3):
        await clients.answers(30)
        await until(lambda: len(clients.begun) >= 5)
        await _done(break_it())
        hit = clients.begun
        async with asyncio.timeout(SOON_S):
            await until(lambda hit=hit: not any(client.has_begun for client in hit))
        await detail_has(served, words)
        await _done(mend())
        await back(served)
    await clients.answers(30)
    await clients.finish()
    assert len(losses(served)) == 3
    await assert_nothing_left(served)


async def _done(outcome: Any) -> None:
    if isinstance(outcome, Awaitable):
        await outcome


@pytest.mark.parametrize("backend", [FACTS, NO_METRICS], ids=["metrics", "no metrics"])
async def test_the_models_process_is_killed_under_load(tmp_path: Path, backend: dict[str, Any]) -> None:
    """Triton stays ready and starts no other: what it says to the next request gives it away.

    A reload brings it back, and it is trusted when it has answered a token: the first thing that it does.
    """
    names = write_adapters(tmp_path / "loras", 6)
    async with (
        servers(tmp_path, control="explicit", engine=SLOW) as (server,),
        serving([server], tmp_path / "loras", backend=backend) as served,
    ):
        firsts = []

        async def mend() -> None:
            before = len(server.served)
            await reload(server)
            await until(lambda: len(server.served) > before)
            firsts.append(server.served[before]["request_id"])

        await rounds(served, Clients(served, names), lambda: server.kill_stub(CORE), "Stub process", mend)
        assert firsts == [PROBE_ID] * 3
        outcomes([server])


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "whole"])
async def test_the_server_is_killed_under_load(tmp_path: Path, decoupled: bool) -> None:
    """It starts again on its ports, cold."""
    names = write_adapters(tmp_path / "loras", 6)
    async with (
        servers(tmp_path, engine=SLOW, decoupled=decoupled) as (server,),
        serving([server], tmp_path / "loras", backend=FACTS) as served,
    ):
        await rounds(served, Clients(served, names), server.kill, "does not answer", server.start)
        outcomes([server])


async def test_the_server_is_frozen_under_load(tmp_path: Path) -> None:
    """All its processes stop, and go on where they were."""
    names = write_adapters(tmp_path / "loras", 6)
    async with (
        servers(tmp_path, engine=SLOW) as (server,),
        serving([server], tmp_path / "loras", backend=FACTS) as served,
    ):
        await rounds(served, Clients(served, names), server.freeze, "does not answer", server.thaw)
        outcomes([server])
