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

from sidecar.backends.triton.probe import PROBE_ID
from sidecar.core.enums import Phase
from tests.e2e.triton.crowd import Clients
from tests.e2e.triton.loads import (
    back,
    detail_has,
    engine_has,
    losses,
    outcomes,
    reload,
    repeated_if_triton_aborts,
    servers,
    told_of,
)
from tests.kit.faults import assert_broken_off, assert_nothing_left, assert_right, attempt
from tests.kit.serving import Serving, serving, until, write_adapters

SLOW = {"time_scale": 0.5}
"""An answer of 30 tokens takes some tenths of a second: there are always some under way."""
FACTS = {"progress_timeout_s": 2.0}
NO_METRICS = FACTS | {"metrics": None}
SOON_S = 20.0
"""Within this a client whose answer had begun is told; it takes a little over the progress timeout."""
CORE = "tensorrt_llm"


# Under load, again and again.


async def rounds(
    served: Serving, names: list[str], break_it: Callable[[], Any], words: str, mend: Callable[[], Any]
) -> None:
    """Break and mend a server twice under load, and let all clients come to their end.

    While it is out, those whose answers had begun are told, and `backends list` says why. An engine that answers whole
    begins no answer that it does not end.
    """
    streams = served.sidecar.gateway.backends["trt-0"].streams
    async with Clients(served, names) as clients:
        for _ in range(2):
            await clients.answers(30)
            await until(lambda: len(clients.begun) >= 5 if streams else clients.waiting >= 20)
            await _done(break_it())
            hit = clients.begun
            async with asyncio.timeout(SOON_S):
                await until(lambda hit=hit: not any(client.has_begun for client in hit))
            await detail_has(served, words)
            await _done(mend())
            await back(served)
        await clients.answers(30)
        await clients.finish()
    assert len(losses(served)) == 2
    await assert_nothing_left(served)


async def _done(outcome: Any) -> None:
    if isinstance(outcome, Awaitable):
        await outcome


@pytest.mark.parametrize(
    "backend", [FACTS, pytest.param(NO_METRICS, marks=pytest.mark.nightly)], ids=["metrics", "no metrics"]
)
@repeated_if_triton_aborts
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

        await rounds(served, names, lambda: server.kill_stub(CORE), "Stub process", mend)
        assert firsts == [PROBE_ID] * 2
        outcomes([server])


@pytest.mark.parametrize(
    "decoupled", [True, pytest.param(False, marks=pytest.mark.nightly)], ids=["decoupled", "whole"]
)
async def test_the_server_is_killed_under_load(tmp_path: Path, decoupled: bool) -> None:
    """It starts again on its ports, cold."""
    names = write_adapters(tmp_path / "loras", 6)
    async with (
        servers(tmp_path, engine=SLOW, decoupled=decoupled) as (server,),
        serving([server], tmp_path / "loras", backend=FACTS) as served,
    ):
        await rounds(served, names, server.kill, "does not answer", server.start)
        outcomes([server])


@pytest.mark.nightly
@repeated_if_triton_aborts
async def test_the_server_is_frozen_under_load(tmp_path: Path) -> None:
    """All its processes stop, and go on where they were."""
    names = write_adapters(tmp_path / "loras", 6)
    async with (
        servers(tmp_path, engine=SLOW) as (server,),
        serving([server], tmp_path / "loras", backend=FACTS) as served,
    ):
        await rounds(served, names, server.freeze, "does not answer", server.thaw)
        outcomes([server])


# In silence.


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("decoupled", "backend"),
    [(True, FACTS), (True, NO_METRICS), (False, NO_METRICS)],
    ids=["streams", "streams without metrics", "whole answers without metrics"],
)
@repeated_if_triton_aborts
async def test_the_models_process_is_killed_and_nobody_asks_anew(
    tmp_path: Path, decoupled: bool, backend: dict[str, Any]
) -> None:
    """No word comes from Triton: its silence is noticed. Begun answers end; the others are given after a reload."""
    (name,) = write_adapters(tmp_path / "loras", 1)
    async with (
        servers(tmp_path, control="explicit", engine=SLOW, decoupled=decoupled) as (server,),
        serving([server], tmp_path / "loras", backend=backend) as served,
    ):
        for round_ in (1, 2):
            await engine_has(server, 0)
            streams = [asyncio.create_task(attempt(served, name, 400)) for _ in range(6 * decoupled)]
            wholes = [asyncio.create_task(attempt(served, name, 400, stream=False)) for _ in range(6)]
            requests = served.state.requests
            await until(lambda: sum(one.first_token for one in requests.values()) == len(streams))  # noqa: B023
            await engine_has(server, len(streams) + len(wholes))
            server.kill_stub(CORE)
            async with asyncio.timeout(SOON_S):
                for tried in await asyncio.gather(*streams):
                    assert_broken_off(served, tried)
                await detail_has(served, "Stub process")
            assert len(losses(served)) == round_
            assert "it answered nothing for" in losses(served)[-1]
            await reload(server)
            for tried in await asyncio.gather(*wholes):
                assert_right(served, tried, 400)
                assert tried.origins[0].heals == 1
        await assert_nothing_left(served)


@pytest.mark.nightly
@repeated_if_triton_aborts
async def test_a_process_that_dies_while_nothing_runs(tmp_path: Path) -> None:
    """Nobody notices; the next request meets it, waits for the reload, and is answered."""
    names = write_adapters(tmp_path / "loras", 2)
    async with (
        servers(tmp_path, control="explicit") as (server,),
        serving([server], tmp_path / "loras", backend=FACTS) as served,
    ):
        for _ in range(2):
            for name in names:
                assert_right(served, await attempt(served, name))
            server.kill_stub(CORE)
            asks = [asyncio.create_task(attempt(served, name)) for name in (*names, "")]
            await detail_has(served, "Stub process")
            assert not any(ask.done() for ask in asks)
            await reload(server)
            for tried in await asyncio.gather(*asks):
                assert_right(served, tried)
        await assert_nothing_left(served)


@pytest.mark.nightly
@repeated_if_triton_aborts
async def test_a_dead_process_gives_its_requests_to_the_other_server(tmp_path: Path) -> None:
    """Nobody waits for a reload where another has the model."""
    names = write_adapters(tmp_path / "loras", 6)
    async with (
        servers(tmp_path, 2, engine=SLOW) as made,
        serving(made, tmp_path / "loras", backend=FACTS) as served,
        Clients(served, names) as clients,
    ):
        await clients.answers(50)
        made[0].kill_stub(CORE)
        await until(lambda: served.state.backends["trt-0"].phase is Phase.DOWN)
        assert "Stub process" in losses(served)[0]
        await clients.answers(100)
        await clients.finish()
        assert (await told_of(served, 1)).state == "up"
        assert served.state.backends["trt-0"].phase is Phase.DOWN
        await assert_nothing_left(served)


@pytest.mark.nightly
@pytest.mark.parametrize("backend", [{}, {"metrics": None}], ids=["metrics", "no metrics"])
async def test_a_long_whole_answer_is_no_silence(tmp_path: Path, backend: dict[str, Any]) -> None:
    """Nothing comes for six times the timeout: the engine's steps are counted, or it answers another a token."""
    (name,) = write_adapters(tmp_path / "loras", 1)
    timeout_s = 1.0
    async with (
        servers(tmp_path, engine={"time_scale": 1.0}, decoupled=False) as (server,),
        serving([server], tmp_path / "loras", backend={"progress_timeout_s": timeout_s} | backend) as served,
    ):
        begun_s = monotonic()
        assert_right(served, await attempt(served, name, 600), 600)
        assert monotonic() - begun_s > 4 * timeout_s, "too short to mean anything"
        assert losses(served) == []
        await assert_nothing_left(served)
