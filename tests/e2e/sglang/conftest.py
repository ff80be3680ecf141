"""These tests need a real SGLang. Where it cannot be had they are skipped, with that reason.

A start takes most of a minute, so one server is shared; a test finds it up, with nothing registered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.e2e.installed import needed
from tests.e2e.sglang.fronted import SIZES, forget_all
from tests.e2e.sglang.installed import SglangInstalled
from tests.e2e.sglang.server import SglangServer
from tests.e2e.vllm.toy import Toy


@pytest.fixture(autouse=True, scope="session")
def _sglang() -> SglangInstalled:
    """The environment that holds the server."""
    return needed(SglangInstalled)


@pytest.fixture(scope="session")
def toy(_sglang: SglangInstalled, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toy]:
    """The model and its adapters."""
    toy = Toy(tmp_path_factory.mktemp("toy"), SIZES.ffn)
    toy.make()
    yield toy
    toy.close()


@pytest.fixture(scope="session")
def _shared(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    server = SglangServer(tmp_path_factory.mktemp("sglang"), toy.model)
    yield server
    asyncio.run(server.stop())


@pytest.fixture
def server(_shared: SglangServer) -> SglangServer:
    """The shared server: three slots beside the base model's, eight adapters in memory, ranks up to 16."""
    if not _shared.is_running:
        asyncio.run(_shared.stop())
        asyncio.run(_shared.start())
    asyncio.run(forget_all(_shared.http_address))
    return _shared
