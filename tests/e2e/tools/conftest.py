"""These tests run other people's tools as they are, each from an environment of its own.

A test's `house` is two emulated engines of a kind behind a sidecar. What a test asserts comes from the tool's own
report, and what is right from the tokenizer of bytes: the engines never end an answer before its length.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.e2e.tools import house as houses


@pytest_asyncio.fixture(params=houses.KINDS)
async def house(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[houses.House]:
    """A sidecar before engines of each kind."""
    async with houses.house(tmp_path / "house", request.param) as house:
        yield house
