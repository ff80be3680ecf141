"""The last bound of a process that is to end: it exits in time whatever hangs, and says what did not end."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable
from math import inf
from pathlib import Path
from time import monotonic

from sidecar.tasks import where

logger = logging.getLogger(__name__)

TELL_S = 2.0
"""How long the telling may take: what hangs may be stderr."""
FRAMES = 6
"""The innermost frames of a thread that are told."""


class LastBound:
    """A thread that ends the process when the time is over that `within` gave it; it needs neither the event loop nor
    another thread. `tell_all` returns when the log is written. Make one in the event loop's thread.
    """

    def __init__(self, tell_all: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._tell_all = tell_all
        self._sooner = threading.Condition()
        self._end_s, self._code = inf, 0
        threading.Thread(target=self._watch, name="last bound", daemon=True).start()

    def within(self, seconds: float, code: int) -> None:
        """Have the process end with an exit code unless it ends by itself before. An earlier bound stays."""
        with self._sooner:
            self._end_s, self._code = min((self._end_s, self._code), (monotonic() + seconds, code))
            self._sooner.notify()

    def _watch(self) -> None:
        with self._sooner:
            while (left_s := self._end_s - monotonic()) > 0:
                self._sooner.wait(min(left_s, threading.TIMEOUT_MAX))
        telling = threading.Thread(target=self._tell, name="last words", daemon=True)
        telling.start()
        telling.join(TELL_S)
        os._exit(self._code)

    def _tell(self) -> None:
        logger.critical("the sidecar was to end and goes on, so it exits with code %d; see below", self._code)
        for task in asyncio.all_tasks(self._loop):
            logger.critical("not ended: task %s in %s", task.get_name(), where(task))
        for thread in threading.enumerate():
            stack = traceback.extract_stack(sys._current_frames().get(thread.ident or 0))[-FRAMES:]
            if not thread.daemon and stack[-1].name != "_worker":  # else a pool's that waits for work: Python ends it
                calls = " > ".join(f"{Path(each.filename).name}:{each.lineno} {each.name}" for each in stack)
                logger.critical("not ended: thread %s in %s", thread.name, calls)
        self._tell_all()
