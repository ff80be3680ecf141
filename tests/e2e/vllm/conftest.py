"""These tests need a real vLLM. Where torch's wheel for the CPU cannot be had they are skipped, with that reason.

A start takes half a minute, so one server is shared: a test finds it up, with nothing registered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests.e2e.installed import needed
from tests.e2e.vllm.direct import forget_all, http_client
from tests.e2e.vllm.faces import EMULATED, EMULATOR, VLLM, Face
from tests.e2e.vllm.installed import VllmInstalled
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import DIMS, SIZE, Toy
from tests.kit.peft_files import TINY
from tests.kit.vllm_emulated import VllmProcess


@pytest.fixture(autouse=True, scope="session")
def _vllm() -> VllmInstalled:
    """The environment that holds the server."""
    return needed(VllmInstalled)


@pytest.fixture(scope="session")
def toy(_vllm: VllmInstalled, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    """The model and its adapters."""
    toy = Toy(tmp_path_factory.mktemp("toy"))
    toy.make()
    yield toy
    toy.close()


@pytest.fixture(scope="session")
def _shared(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    server = VllmServer(tmp_path_factory.mktemp("vllm"), toy.model)
    asyncio.run(server.start())
    yield server
    asyncio.run(server.stop())


@pytest.fixture
def server(_shared: VllmServer) -> VllmServer:
    """The shared server: two slots, four adapters in memory, ranks up to 16, 64 requests at a time.

    It is made ready before the test has an event loop.
    """
    if not _shared.is_running:
        asyncio.run(_shared.kill())
        asyncio.run(_shared.start())
    asyncio.run(forget_all(_shared.http_address))
    return _shared


@pytest.fixture(scope="session")
def _emulated(_vllm: VllmInstalled) -> Iterator[VllmProcess]:
    with asyncio.Runner() as runner:
        arguments = [part for option, value in EMULATED.items() for part in (f"--{option}", str(value))]
        process = VllmProcess(*arguments, "--compute", "llama")
        runner.run(process.start())
        yield process
        runner.run(process.kill())


@pytest.fixture(params=[VLLM, EMULATOR])
def face(request: pytest.FixtureRequest, tmp_path: Path) -> Face:
    """vLLM or the emulator, with nothing registered."""
    if request.param == VLLM:
        return Face(VLLM, request.getfixturevalue("server").http_address, DIMS, tmp_path, SIZE)
    address = request.getfixturevalue("_emulated").http_address
    asyncio.run(forget_all(address))
    return Face(EMULATOR, address, TINY, tmp_path, 0.5)


@pytest_asyncio.fixture
async def client(face: Face) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a face."""
    async with http_client(face.address) as client:
        yield client
