"""What ends an engine, on vLLM itself and on the emulator: the files of a registered adapter are deleted.

Behind the sidecar, requests without a token are answered by another engine. A bare server tells its clients in words
that its version and its front end have for it.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeGuard

import httpx
import pytest

from sidecar.core.events import BackendLost, Event
from tests.e2e.vllm.direct import complete, completion, http_client, inside, load
from tests.e2e.vllm.faces import EMULATOR, VLLM, Face, remove
from tests.e2e.vllm.fronted import Told, ask, ask_into, backend_of
from tests.e2e.vllm.installed import chosen
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import DIMS, SIZE, Toy
from tests.kit.peft_files import TINY
from tests.kit.serving import serving, until
from tests.kit.vllm_emulated import VllmProcess, expected

PROMPT = [3, 4, 5]
PATIENCE_S = 60.0
OLDER = "EngineCore encountered an issue. See stack trace (above) for the root cause."
DEAD = OLDER if chosen().version == "0.32.0" else "The server had an error while processing your request."
RUST_DEAD = "engine core reported fatal failure"
OPTIONS = ("--max-loras", "2", "--max-cpu-loras", "4", "--vllm-version", chosen().version)
WAITING = 6


@pytest.fixture(params=[VLLM, EMULATOR])
def kind(request: pytest.FixtureRequest) -> str:
    """The shared server is made ready before there is an event loop."""
    if request.param == VLLM:
        request.getfixturevalue("server")
    return str(request.param)


@pytest.mark.nightly
async def test_deleted_files_end_a_bare_engine(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Dropped from its memory, an adapter is read again from where it was: the request and all others fail with it."""
    if kind == VLLM:
        server: VllmServer = request.getfixturevalue("server")
        await _die(Face(VLLM, server.http_address, DIMS, tmp_path, SIZE), server.ended)
        assert not server.is_running
        return
    async with VllmProcess(*OPTIONS, "--compute", "none", time_scale=1.0) as emulated:
        await _die(Face(EMULATOR, emulated.http_address, TINY, tmp_path, 0.5), emulated.wait)


async def _die(face: Face, ended: Callable[[], Awaitable[Any]]) -> None:
    paths = [face.adapter(seed) for seed in range(6)]
    async with http_client(face.address) as client:
        for number, path in enumerate(paths):
            (await load(client, f"m{number}", path)).raise_for_status()
        remove(paths[0])
        # Four fit into its memory: the first is not among them.
        for number in range(2, 6):
            assert len(await complete(client, f"m{number}", PROMPT, 2)) == 2
        other = asyncio.create_task(client.post("/v1/completions", json=completion("m5", PROMPT, 900)))
        await _runs(client)
        first = await client.post("/v1/completions", json=completion("m0", PROMPT, 2))
        for reply in (first, await other):
            assert reply.status_code == 500
            assert (reply.json()["error"]["type"], reply.json()["error"]["message"]) == (
                "InternalServerError",
                DEAD,
            )
        async with asyncio.timeout(PATIENCE_S):
            await ended()
        with pytest.raises(httpx.TransportError):
            await client.get("/health")


async def _runs(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while 'vllm:num_requests_running{engine="0",model_name="base"} 0.0' in (await client.get("/metrics")).text:
            await asyncio.sleep(0.005)


async def test_a_death_before_the_first_token(either: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """The engine dies with requests in it: those without a token go to the next engine, and their clients hear nothing.

    An answer that had begun ends with the reason. The other engine is an emulated one, and away at first.
    """
    gone = shutil.copytree(toy.adapters / "a00", tmp_path / "gone")
    others = {f"m{number}": toy.adapters / f"a{number:02}" for number in range(1, either.max_cpu_loras + 1)}
    async with VllmProcess("--compute", "none") as other, http_client(either.http_address) as direct:
        backends = [
            backend_of(either, tmp_path / "shared"),
            {"url": f"vllm://{other.http_address}", "id": "other"},
        ]
        async with (
            serving([], None, [tmp_path], backends=backends) as served,
            http_client(served.sidecar.http_address) as client,
        ):
            await other.kill()
            await until(lambda: not served.state.backends["other"].takes_requests)
            for name, path in {"gone": gone, **others}.items():
                (await load(direct, name, path)).raise_for_status()
            shutil.rmtree(gone)
            begun = Told("base", 0)
            telling = asyncio.create_task(ask_into(begun, client, PROMPT, 900, stream=True))
            await until(lambda: len(begun.tokens) > 2)
            async with either.engine_held():
                asks = [asyncio.create_task(ask(client, "base", PROMPT, 4, stream=bool(n % 2))) for n in range(WAITING)]
                await _are_inside(direct, WAITING + 1)
                last = asyncio.create_task(direct.post("/v1/completions", json=completion("gone", PROMPT, 2)))
                await _are_inside(direct, WAITING + 2)
            told_why = await last
            assert (told_why.status_code, told_why.json()["error"]["code"]) == (500, 500)
            await until(lambda: not served.state.backends["vllm-0"].takes_requests)
            await other.start()
            for told in await asyncio.gather(*asks):
                assert (told.status, told.error, told.whole) == (200, "", True)
                assert told.tokens == expected("", None, 4)
            await telling
            assert "an answer that has begun is never repeated" in begun.error
            (why,) = [event.cause for event in served.recorder.events if _is_loss_of("vllm-0", event)]
            assert (RUST_DEAD if either.is_rust else DEAD) in why


def _is_loss_of(backend: str, event: Event) -> TypeGuard[BackendLost]:
    return isinstance(event, BackendLost) and event.backend == backend


async def _are_inside(direct: httpx.AsyncClient, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await inside(direct) < count:
            await asyncio.sleep(0.01)
