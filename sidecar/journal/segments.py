"""Segment files of the journal, and the thread that writes them.

A segment can be replayed alone. Its first line says how it was made and holds the core's state. The numerous parts of
the state, versions and requests, follow in pieces: ten thousand of them are megabytes, and encoding a megabyte at once
would keep the interpreter from the event loop. Then follows one line per step: the time, the event, and a digest of the
effects. A file gets its final name once the state is written in full, so a segment never lacks its beginning; a crash
can cut off only its last line.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from importlib.metadata import version
from io import BufferedWriter
from pathlib import Path
from typing import Any

from sidecar.core.state import State
from sidecar.journal import codec

logger = logging.getLogger(__name__)

FORMAT = 11
PREFIX, SUFFIX, UNFINISHED = "segment-", ".jsonl", ".unfinished"
FLUSH_S = 0.1
WAKE_LINES = 256
PIECE_BYTES = 1 << 16
LARGE = ("versions", "requests")
"""The fields of the state that are written in pieces."""


@dataclass(frozen=True)
class Opening:
    """Begins a segment: the copied state, and the number of the first step that follows."""

    state: State
    first_step: int


@dataclass(frozen=True)
class Last:
    """The last line of the journal."""

    line: bytes


@dataclass(frozen=True)
class Barrier:
    """Sets an event once everything before it has been written."""

    reached: threading.Event


def product_version() -> str:
    return version("lora-sidecar")


def effects_digest(effects: Iterable[Any]) -> str:
    """Return the digest of a step's effects that the step's line carries."""
    return blake2b(codec.listed(effects), digest_size=8).hexdigest()


def segment_paths(directory: Path) -> list[Path]:
    """Return a journal's segments, oldest first."""
    return sorted(directory.glob(f"{PREFIX}*{SUFFIX}"))


def header_lines(opening: Opening) -> Iterator[bytes]:
    """Yield a segment's first lines. Other threads can run between the pieces."""
    state = opening.state
    config = state.config
    yield _line(
        {
            "journal": FORMAT,
            "version": product_version(),
            "began": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "first_step": opening.first_step,
            "policies": {kind: getattr(config, kind) for kind in ("eviction", "ordering", "routing", "prefetch")},
            "config": config,
            "state": replace(state, versions={}, requests={}),
        }
    )
    for name in LARGE:
        yield from _field_lines(name, getattr(state, name))
    yield _line({"complete": True})


def _field_lines(name: str, held: dict[Any, Any]) -> Iterator[bytes]:
    """Yield the items of a dict of the state, as many per line as make a piece."""
    pieces: list[bytes] = []
    size_bytes = 0
    for item in held.items():
        time.sleep(0)  # let the event loop have the interpreter
        piece = codec.dumps(item)
        pieces.append(piece)
        size_bytes += len(piece)
        if size_bytes >= PIECE_BYTES:
            yield _field_line(name, pieces)
            pieces, size_bytes = [], 0
    if pieces:
        yield _field_line(name, pieces)


def _field_line(name: str, pieces: list[bytes]) -> bytes:
    return b'{"field":"%s","items":[%s]}\n' % (name.encode(), b",".join(pieces))


def _line(record: dict[str, Any]) -> bytes:
    return codec.dumps(record) + b"\n"


class SegmentWriter:
    """A thread behind a bounded queue. Only the event loop calls `begin` and `append`.

    After a failure everything up to the next `begin` is discarded: a segment with a hole could not be replayed.
    """

    def __init__(self, directory: Path, segments_max: int, queued_bytes_max: int) -> None:
        self._directory = directory
        self._segments_max = segments_max
        self._queued_bytes_max = queued_bytes_max
        self._queue: deque[bytes | Opening | Last | Barrier] = deque()
        self._appended_bytes = 0
        self._taken_bytes = 0
        self._lines = 0
        self._wake = threading.Event()
        self._stopping = False
        self._file: BufferedWriter | None = None
        self._path: Path | None = None
        self.fails = False
        """Nothing could be written when that was last tried."""
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self.failed = False
        """The current segment is lost."""
        self.header_bytes = 0
        self.written_bytes = 0
        self.errors = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what is queued and end the thread. Does nothing if it was never started."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def idle(self) -> bool:
        """True if nothing is queued."""
        return not self._queue

    def begin(self, opening: Opening) -> None:
        self.failed = False
        self.header_bytes = 0
        self._queue.append(opening)
        self._wake.set()

    def append(self, line: bytes) -> bool:
        """Queue a line; return False, with nothing queued, if the queue is full."""
        if self._appended_bytes - self._taken_bytes + len(line) > self._queued_bytes_max:
            return False
        self._appended_bytes += len(line)
        self._queue.append(line)
        self._lines += 1
        if self._lines % WAKE_LINES == 0:
            self._wake.set()
        return True

    def end(self, line: bytes) -> None:
        """Queue the very last line. It is written even if the current segment is lost, behind what could be written."""
        self._queue.append(Last(line))
        self._wake.set()

    def flush(self) -> None:
        """Wait until everything queued is in the file. Blocks: for the end of the process and for tests."""
        barrier = Barrier(threading.Event())
        self._queue.append(barrier)
        self._wake.set()
        barrier.reached.wait()

    # The thread's part.

    def _run(self) -> None:
        while not (self._stopping and not self._queue):
            self._wake.wait(FLUSH_S)
            self._wake.clear()
            self._write_queued()
        self._close()

    def _write_queued(self) -> None:
        lines: list[bytes] = []
        while self._queue:
            item = self._queue.popleft()
            if isinstance(item, bytes):
                self._taken_bytes += len(item)
                lines.append(item)
                continue
            self._write(lines)
            lines = []
            if isinstance(item, Opening):
                self._open(item)
            elif isinstance(item, Last):
                self._write_last(item.line)
            else:
                item.reached.set()
        self._write(lines)

    def _write(self, lines: list[bytes]) -> None:
        if self._file is None or not lines:
            return
        try:
            self._put(self._file, b"".join(lines))
            self._file.flush()
        except OSError as error:
            self._fail(error)

    def _write_last(self, line: bytes) -> None:
        try:
            if self._file is None and self._path is not None:
                self._file = _reopened(self._path)
            self._write([line])
        except OSError as error:
            self._fail(error)

    def _put(self, file: BufferedWriter, piece: bytes) -> None:
        file.write(piece)
        self.written_bytes += len(piece)

    def _open(self, opening: Opening) -> None:
        self._close()
        try:
            self._file = self._begun(opening)
        except Exception as error:  # noqa: BLE001 — a plug-in's snapshot may be at fault; serving continues
            self._fail(error)
            return
        if self.fails:
            logger.info("the journal is written again")
            self.fails = False

    def _begun(self, opening: Opening) -> BufferedWriter:
        self._directory.mkdir(parents=True, exist_ok=True)
        for unfinished in self._directory.glob(f"*{UNFINISHED}"):
            unfinished.unlink()
        path = self._directory / f"{PREFIX}{self._next_number():09d}{SUFFIX}"
        begun = path.with_suffix(UNFINISHED)
        file = begun.open("wb")
        try:
            before = self.written_bytes
            for line in header_lines(opening):
                self._put(file, line)
            file.flush()
            self.header_bytes = self.written_bytes - before
            begun.rename(path)
            self._path = path
            for old in segment_paths(self._directory)[: -self._segments_max]:
                old.unlink()
        except BaseException:
            file.close()
            raise
        return file

    def _next_number(self) -> int:
        paths = segment_paths(self._directory)
        return int(paths[-1].stem.removeprefix(PREFIX)) + 1 if paths else 1

    def _fail(self, error: Exception) -> None:
        """Give up the segment. Logged once until writing works again: a full disk must not fill the log too."""
        self.errors += 1
        self.failed = True
        self._close()
        if not self.fails:
            logger.error("the journal cannot be written in %s: %s; serving goes on without it", self._directory, error)
            self.fails = True

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        try:
            file.close()
        except OSError as error:
            logger.debug("closing a segment failed: %s", error)


def _reopened(path: Path) -> BufferedWriter:
    """Return a segment opened for appending behind its last whole line."""
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return path.open("ab")
