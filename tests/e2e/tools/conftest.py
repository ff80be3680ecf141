"""These tests run other people's tools as they are, each from an environment of its own.

A test's `house` is two emulated engines of a kind behind a sidecar. What a test asserts comes from the tool's own
report, and what is right from the tokenizer of bytes: the engines never end an answer before its length.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.e2e.installed import needed
from tests.e2e.tools import house as houses
from tests.e2e.tools.installed import Tools


@pytest.fixture
def tools(request: pytest.FixtureRequest) -> Tools:
    """The environment that a module's tests need."""
    kind: type[Tools] = request.module.TOOLS
    return needed(kind)


@pytest_asyncio.fixture(params=houses.KINDS)
async def house(request: pytest.FixtureRequest, tools: Tools, tmp_path: Path) -> AsyncIterator[houses.House]:
    """A sidecar before engines of each kind."""
    async with houses.house(tmp_path / "house", request.param) as house:
        yield house
