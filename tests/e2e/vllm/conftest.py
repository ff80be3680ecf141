"""These tests need a real vLLM: without one they are skipped on a laptop and fail in continuous integration.

A start takes half a minute, so one server is shared: a test finds it up, with nothing registered.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from tests.e2e.vllm.direct import forget_all
from tests.e2e.vllm.installed import Installed, NotInstalled
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import Toy


@pytest.fixture(autouse=True, scope="session")
def _vllm() -> Installed:
    """The environment that holds the server."""
    try:
        return Installed.find()
    except NotInstalled as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing), pytrace=False)
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def toy(_vllm: Installed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
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
    """The shared server: two slots, four adapters in memory, ranks up to 16, 64 requests at a time."""
    if not _shared.is_running:
        asyncio.run(_shared.kill())
        asyncio.run(_shared.start())
    asyncio.run(forget_all(_shared.http_address))
    return _shared
