"""A command in a terminal of its own, and the screen that a person would see."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import pyte

from tests.kit.forked import Popen
from tests.kit.serving import PATIENCE_S

UP, DOWN, ENTER, ESCAPE, PAGE_DOWN = "\x1b[A", "\x1b[B", "\r", "\x1b", "\x1b[6~"


class Terminal:
    """Runs `python -m sidecar ARGUMENTS` in a pseudo-terminal of a size; pyte interprets what it writes."""

    def __init__(self, *arguments: str, columns: int = 80, lines: int = 24) -> None:
        self._arguments, self._size = arguments, (lines, columns)
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._ours, theirs = pty.openpty()
        size = {"COLUMNS": str(self._size[1]), "LINES": str(self._size[0])}  # ours may name another
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *self._size, 0, 0))
        self.process: Popen[bytes] = Popen(
            [sys.executable, "-m", "sidecar", *self._arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env=os.environ | size | {"TERM": "xterm-256color", "COLORTERM": "truecolor"},
        )  # fmt: skip
        os.close(theirs)
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._reading.join()
        os.close(self._ours)

    def hang_up(self) -> None:
        """Close the terminal, as whoever closes its window does."""
        os.close(self._ours)
        self._ours = os.open(os.devnull, os.O_RDONLY)

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    async def ended(self) -> None:
        """Wait until the command has ended and all that it wrote is on the screen."""
        await asyncio.to_thread(self._reading.join)

    @property
    def lines(self) -> list[str]:
        with self._lock:
            return [line.rstrip() for line in self._screen.display]

    @property
    def flat(self) -> str:
        """The lines joined with single blanks, so that a sentence is found wherever it is wrapped."""
        return " ".join(" ".join(self.lines).split())

    async def shows(self, *parts: str) -> None:
        """Wait until all of these are on the screen."""
        for part in parts:
            await self.matches(re.escape(part))

    async def matches(self, pattern: str) -> None:
        """Wait until a pattern is on the screen. Raises AssertionError with the screen if it does not come."""
        await self._until(lambda: bool(re.search(pattern, self.flat)), f"{pattern} did not appear")

    async def hides(self, part: str) -> None:
        """Wait until this is not on the screen any more."""
        await self._until(lambda: part not in self.flat, f"{part} did not go")

    async def _until(self, holds: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not holds():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            screen = "\n".join(self.lines)
            raise AssertionError(f"{what}; the screen is:\n{screen}") from None

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._ours, 1 << 16)
            except OSError:  # the process has ended
                return
            if not data:
                return
            with self._lock:
                self._stream.feed(data)
