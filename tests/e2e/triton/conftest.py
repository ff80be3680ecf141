"""These tests need a real Triton."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.e2e.installed import needed
from tests.e2e.server import Server
from tests.e2e.triton.installed import TritonInstalled


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which starts of the server were tried again: more of them than before would be news."""
    if Server.crashes:
        terminalreporter.section("starts of the server that crashed and were tried again")
        for number, crash in enumerate(Server.crashes, 1):
            terminalreporter.line(f"{number}. {crash}")


@pytest.fixture(autouse=True, scope="session")
def _triton() -> TritonInstalled:
    """The environment that holds the server."""
    return needed(TritonInstalled)


@pytest.fixture(scope="session")
def loop_of_servers(_triton: TritonInstalled) -> Iterator[asyncio.Runner]:
    """The event loop in which servers that several tests share are started and stopped."""
    with asyncio.Runner() as runner:
        yield runner
