"""What ends a bare engine, on vLLM itself and on the emulator: the files of a registered adapter are deleted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.vllm.direct import complete, completion, http_client, load
from tests.e2e.vllm.faces import EMULATOR, VLLM, Face, remove
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import DIMS, SIZE
from tests.kit.peft_files import TINY
from tests.kit.vllm_emulated import VllmProcess

pytestmark = pytest.mark.nightly

PROMPT = [3, 4, 5]
PATIENCE_S = 60.0
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
OPTIONS = ("--max-loras", "2", "--max-cpu-loras", "4")


@pytest.fixture(params=[VLLM, EMULATOR])
def kind(request: pytest.FixtureRequest) -> str:
    """The shared server is made ready before there is an event loop."""
    if request.param == VLLM:
        request.getfixturevalue("server")
    return str(request.param)


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
            assert (reply.json()["error"]["type"], reply.json()["error"]["message"]) == ("InternalServerError", DEAD)
        async with asyncio.timeout(PATIENCE_S):
            await ended()
        with pytest.raises(httpx.TransportError):
            await client.get("/health")


async def _runs(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while 'vllm:num_requests_running{engine="0",model_name="base"} 0.0' in (await client.get("/metrics")).text:
            await asyncio.sleep(0.005)
