"""These tests need a real Triton: without one they are skipped on a laptop and fail in continuous integration."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from tests.e2e.triton.installed import Installed, NotInstalled


@pytest.fixture(autouse=True, scope="session")
def _triton() -> Installed:
    """The environment that holds the server."""
    try:
        return Installed.find()
    except NotInstalled as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing), pytrace=False)
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def loop_of_servers(_triton: Installed) -> Iterator[asyncio.Runner]:
    """The event loop in which servers that several tests share are started and stopped."""
    with asyncio.Runner() as runner:
        yield runner
