"""A test that hangs ends its process, and tells on stderr what each of its threads and tasks is at.

Its bound is `timeout` in pyproject.toml; `@pytest.mark.timeout(…)` gives a test another one. With pytest-xdist the
process is one worker: the test is reported as the one that it crashed on, and another worker goes on.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import pytest_timeout

from sidecar.tasks import where


def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    """Set the timer of a test, instead of pytest-timeout's own: that tells of no tasks, and of nothing under xdist."""
    timer = threading.Timer(settings.timeout, _end, (item, settings))
    timer.daemon = True
    item.cancel_timeout = timer.cancel  # type: ignore[attr-defined]
    timer.start()
    return True


def _end(item: pytest.Item, settings: Any) -> None:
    if pytest_timeout.is_debugging() and not settings.disable_debugger_detection:
        return
    capturing: Any = item.config.pluginmanager.getplugin("capturemanager")
    if capturing:
        capturing.suspend_global_capture(item)
    text = "\n".join((f"{item.nodeid} has not ended after {settings.timeout:g} s", *_threads(), *_tasks(), ""))
    os.write(2, text.encode(errors="backslashreplace"))
    os._exit(1)


def _threads() -> Iterator[str]:
    frames = sys._current_frames()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.ident in frames:
            yield f"thread {thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident]))}"


def _tasks() -> Iterator[str]:
    for each in gc.get_objects():
        if isinstance(each, asyncio.AbstractEventLoop):
            yield from (f"task {task.get_name()} in {where(task)}" for task in asyncio.all_tasks(each))
