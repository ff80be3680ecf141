"""A pytest plugin (`pytest -p tools.test_times`) that prints the cost of each test file at the end, the dearest first.

CPU seconds cover the process that runs the tests with its threads, the processes that it started and that have ended,
and those that still run when the file ends. A fixture counts for the file in which it is set up. Importing the test
files is a separate line, because every worker imports all of them. `--times FILE` also writes the figures as JSON.
"""

from __future__ import annotations

import json
import resource
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

COLLECTION = "(import)"

Times = dict[str, tuple[float, float]]
"""CPU seconds and wall seconds, by test file."""


def used() -> tuple[float, float]:
    """Return the CPU seconds that this process and all under it have used so far, and the time of day in seconds."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        cpu += times.user + times.system + times.children_user + times.children_system
    return cpu, time.perf_counter()


class TestTimes:
    """Measures in each process that runs tests; the one that started them collects and prints."""

    __test__ = False

    def __init__(self) -> None:
        self.times: Times = defaultdict(lambda: (0.0, 0.0))
        self._began: tuple[float, float] | None = None
        self._session = used()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._add(COLLECTION, self._session)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        began = self._began = self._began or used()
        result = yield
        if nextitem is None or nextitem.path != item.path:
            self._add(item.nodeid.partition("::")[0], began)
            self._began = None
        return result

    def _add(self, file: str, began: tuple[float, float]) -> None:
        cpu, wall = (now - then for now, then in zip(used(), began, strict=True))
        before = self.times[file]
        self.times[file] = (before[0] + cpu, before[1] + wall)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["times"] = dict(self.times)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        for file, (cpu, wall) in getattr(node, "workeroutput", {}).get("times", {}).items():
            before = self.times[file]
            self.times[file] = (before[0] + cpu, before[1] + wall)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
        terminalreporter.section("CPU and wall seconds by test file")
        for line in table(self.times):
            terminalreporter.line(line)
        if config.getoption("--times") is not None:
            Path(config.getoption("--times")).write_text(json.dumps(self.times, indent=1) + "\n")


def table(times: Mapping[str, tuple[float, float]]) -> Iterable[str]:
    """Yield lines: files by CPU seconds, then folders, then the total."""
    folders: Times = defaultdict(lambda: (0.0, 0.0))
    for file, (cpu, wall) in times.items():
        folder = file.rpartition("/")[0] or file
        folders[folder] = (folders[folder][0] + cpu, folders[folder][1] + wall)
    total = {"total": (sum(cpu for cpu, _ in times.values()), sum(wall for _, wall in times.values()))}
    for part in (times, folders, total):
        for name, (cpu, wall) in sorted(part.items(), key=lambda one: -one[1][0]):
            yield f"{cpu:9.1f}{wall:9.1f}  {name}"
        yield ""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", metavar="FILE", help="write what test files cost as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(TestTimes(), "test-times")
