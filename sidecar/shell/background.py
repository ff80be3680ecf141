"""Locks by key, and work in threads that the process need not wait for: a download may hang in a read.

The threads are daemons, and their futures are settled from outside when the process leaves. So a silent server delays
neither the exit nor the callers that wait.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from sidecar.errors import Reason, Refused

T = TypeVar("T")


class Locks:
    """A lock for each key, while somebody uses or awaits it."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, list[None]]] = {}

    @asynccontextmanager
    async def of(self, key: str) -> AsyncIterator[None]:
        """Enter the work on a key: one task at a time, in order of arrival."""
        lock, users = self._locks.setdefault(key, (asyncio.Lock(), []))
        users.append(None)
        try:
            async with lock:
                yield
        finally:
            users.pop()
            if not users:
                del self._locks[key]


class BackgroundThreads:
    """Run functions in threads of their own until closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[int, tuple[Future[Any], threading.Event]] = {}
        self._count = 0
        self._closed = False

    def begin(self, run: Callable[[threading.Event], T], stop: threading.Event | None = None) -> Future[T]:
        """Call `run(stop)` in a new thread; it should end soon once `stop` is set."""
        stop = stop or threading.Event()
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                future.set_exception(_leaving())
                return future
            self._count += 1
            number = self._count
            self._under_way[number] = (future, stop)
        threading.Thread(target=self._run, args=(number, future, run, stop), name="download", daemon=True).start()
        return future

    def _run(self, number: int, future: Future[T], run: Callable[[threading.Event], T], stop: threading.Event) -> None:
        settle: Callable[[], None]
        try:
            settle = partial(future.set_result, run(stop))
        except BaseException as error:  # noqa: BLE001 — the caller gets it, whatever it is
            settle = partial(future.set_exception, error)
        with suppress(InvalidStateError):  # closed meanwhile: nobody waits for the result
            settle()
        with self._lock:
            self._under_way.pop(number, None)

    def close(self) -> None:
        """Stop what is running, and fail the callers that wait with Refused(DRAINING)."""
        with self._lock:
            self._closed = True
            under_way = list(self._under_way.values())
        for future, stop in under_way:
            stop.set()
            with suppress(InvalidStateError):
                future.set_exception(_leaving())


def _leaving() -> Refused:
    return Refused(Reason.DRAINING, "this sidecar is going down")
