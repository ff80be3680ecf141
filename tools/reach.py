"""A pytest plugin that records how long tests take, and which functions of instrumented sources each test file calls.

`tools.mutants` instruments a room's sources by `instrumented` and runs its tests with this plugin, to choose tests by
the functions that they call. REACH_FILE names the JSON file to write. LIMITS names an earlier one instead: no test may
then take much longer than it did, and the process ends with TIMEOUT if one does.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAME = "__reach__"
"""The set that instrumented functions add themselves to: a builtin, since tested code may not import anything.
In a process without this plugin, each module has its own set, which nobody reads.
"""
DEFINED = f"try:\n    {NAME}\nexcept NameError:\n    {NAME} = set()"

TIMEOUT = 99
CPU_SLACK_S, SLACK_S = 5.0, 30.0

_called: set[str] = set()
_functions: dict[str, set[str]] = defaultdict(set)
"""By test file, each "path:line" of a `def` or its first decorator. What is set up for several files counts once."""
_seconds: dict[str, tuple[float, float]] = {}
"""By test: of time, and of CPU time."""
_before: dict[str, tuple[float, float]] = (
    json.loads(Path(os.environ["LIMITS"]).read_text())["seconds"] if "LIMITS" in os.environ else {}
)
setattr(builtins, NAME, _called)


def instrumented(source: str, file: str) -> str:
    """Return a source whose functions record their calls."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            line = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            _insert(node.body, f"{NAME}.add({f'{file}:{line}'!r})")
    _insert(tree.body, DEFINED)
    return ast.unparse(tree)


def _insert(body: list[ast.stmt], text: str) -> None:
    """Insert statements at the start, after a docstring and imports from `__future__`."""
    place = 0
    while place < len(body) and (_is_text(body[place]) or _is_of_the_future(body[place])):
        place += 1
    body[place:place] = ast.parse(text).body


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_of_the_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _take(file: str) -> None:
    _functions[file] |= _called
    _called.clear()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Record the functions that importing a test file calls, for example to compute its parameters."""
    try:
        return (yield)
    finally:
        if isinstance(collector, pytest.Module):
            _take(collector.nodeid)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    started, cpu = time.monotonic(), time.process_time()
    if "LIMITS" in os.environ:
        _limit(*_before.get(item.nodeid, (0.0, 0.0)))
    try:
        return (yield)
    finally:
        _take(item.nodeid.partition("::")[0])
        _seconds[item.nodeid] = time.monotonic() - started, time.process_time() - cpu


def limit_s(seconds: float) -> float:
    return SLACK_S + 3 * seconds


def _limit(seconds: float, cpu_seconds: float) -> None:
    """End the process when a test takes long. A loop without end is told by its CPU time, on a busy machine as well;
    what waits for ever by the clock, which is given more.
    """
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, lambda number, frame: os._exit(TIMEOUT))
    signal.setitimer(signal.ITIMER_REAL, limit_s(seconds))
    signal.setitimer(signal.ITIMER_PROF, CPU_SLACK_S + 3 * cpu_seconds)


def pytest_sessionfinish() -> None:
    for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
        signal.setitimer(timer, 0)
    if "REACH_FILE" in os.environ:
        record = {"seconds": _seconds, "functions": {file: sorted(called) for file, called in _functions.items()}}
        Path(os.environ["REACH_FILE"]).write_text(json.dumps(record))
