"""Tasks and their ends: an owner begins them, and stops them until they are over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

CANCEL_S = 1.0
"""How long a cancelled task may take until it is cancelled again."""


class Tasks:
    """The tasks of one owner, each kept until it has ended."""

    def __init__(self) -> None:
        self._going: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._going.add(task)
        task.add_done_callback(self._going.discard)
        return task

    async def stop(self) -> None:
        """End all, those included that one of them begins meanwhile."""
        while going := [task for task in self._going if not task.done()]:
            await ended(*going)


async def ended(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks, and wait until each has ended, in whatever way; None stands for a task that was not begun.

    They are cancelled more than once: what a task awaits may swallow a cancellation, as `asyncio.wait_for` does before
    Python 3.12, in Redis' client too. What a task must not leave in the middle is `undisturbed`.
    """
    going = {task for task in tasks if task is not None}
    while going:
        for task in going:
            task.cancel()
        done, going = await asyncio.wait(going, timeout=CANCEL_S)
        for task in done:
            if not task.cancelled():
                task.exception()  # retrieved, so that asyncio does not report it


async def undisturbed(work: Awaitable[T]) -> T:
    """Wait for work to end, such as a thread's, however often the waiting task is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # retrieved, so that asyncio does not report it: no caller is left
    raise cancelled


def where(task: asyncio.Task[Any]) -> str:
    """Return what a task awaits, its own coroutine first: "app.py:430 Sidecar.stop > keeper.py:50 Keeper.close"."""
    at: Any = task.get_coro()
    steps = []
    while (kind := next((kind for kind in ("cr", "gi", "ag") if hasattr(at, f"{kind}_frame")), None)) is not None:
        if (frame := getattr(at, f"{kind}_frame")) is not None:
            steps.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {at.__qualname__}")
        at = getattr(at, {"cr": "cr_await", "gi": "gi_yieldfrom", "ag": "ag_await"}[kind])
    return " > ".join(steps)
