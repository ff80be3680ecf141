"""The audit's lines on their way out: a thread behind a bounded queue, files that rotate, and reading them again.

Changes and denials have files of their own, `audit.jsonl` and `audit.denials.jsonl`, each with its own rotation:
anybody can cause denials, and a flood of them must not push out who changed what. A full file becomes
`audit.000001.jsonl`, then `audit.000002.jsonl`, so the highest number is the newest.
"""

from __future__ import annotations

import heapq
import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from sidecar.state.registry import other_format

logger = logging.getLogger(__name__)

FORMAT = 1
"""The number of the format of a line, which each line has."""
Kind = Literal["change", "denial"]
KINDS: tuple[Kind, ...] = ("change", "denial")
DENIALS_QUEUED_MAX = 10_000
CHANGES_QUEUED_MAX = 20_000
"""Changes have room that denials cannot fill."""
BATCH_BYTES = 64 << 10
"""Lines are written together up to here; a file may be larger than its limit by less than that."""
DIGITS = 6
TICK_S = 1.0
STOP_S = 5.0
"""How long `stop` waits for a file system that does not answer."""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One JSON object, and what is called with True once it is written, or with False if it is lost."""

    kind: Kind
    text: str
    told: Callable[[bool], None] | None = None


class Sink(Protocol):
    """Where lines of one kind go."""

    def append(self, data: bytes) -> None:
        """Write whole lines. Raises OSError if none of them is written."""

    def close(self) -> None: ...


class RotatingFile:
    """A file that is renamed when it would pass `bytes_max`; `files_max` files are kept in all.

    `is_synced` flushes each write to the disk, so that a machine that loses its power keeps it.
    """

    def __init__(self, path: Path, bytes_max: int, files_max: int, is_synced: bool) -> None:
        self._path = path
        self._bytes_max = bytes_max
        self._files_max = files_max
        self._is_synced = is_synced
        self._descriptor = -1

    def append(self, data: bytes) -> None:
        """Write lines. Raises OSError; then no part of them stays in the file."""
        if not self._is_open():
            self._open()
        size_bytes = os.fstat(self._descriptor).st_size
        if size_bytes and size_bytes + len(data) > self._bytes_max:
            self._rotate()
            size_bytes = 0
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
            if self._is_synced:
                os.fsync(self._descriptor)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, size_bytes)
            raise

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _is_open(self) -> bool:
        """Return False if the file is not open, or if somebody has moved or deleted it."""
        if self._descriptor < 0:
            return False
        try:
            same = os.path.samestat(self._path.stat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            same = False
        if not same:
            self.close()
        return same

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size_bytes = os.fstat(self._descriptor).st_size
        if size_bytes and os.pread(self._descriptor, 1, size_bytes - 1) != b"\n":
            os.write(self._descriptor, b"\n")  # a kill cut the last line; the next one must not continue it

    def _rotate(self) -> None:
        rotated = rotated_files(self._path)
        newest = rotated[-1].name.removeprefix(f"{self._path.stem}.")[:DIGITS] if rotated else "0"
        full = self._path.with_suffix(f".{int(newest) + 1:0{DIGITS}d}{self._path.suffix}")
        self._path.rename(full)
        self.close()
        for old in reversed([full, *reversed(rotated)][self._files_max - 1 :]):
            old.unlink(missing_ok=True)
        self._open()


class Stdout:
    """The standard output of the process."""

    def append(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def close(self) -> None:
        """Leave it open: it is not ours."""


class Log:
    """The process's log, where nothing else is configured: a process without a data directory keeps no files."""

    def append(self, data: bytes) -> None:
        for line in data.decode().splitlines():
            logger.info("audit: %s", line)

    def close(self) -> None:
        """Do nothing."""


class AuditLog:
    """The thread that writes. It calls `tick` about once a second; `lost` and `written` count lines since the start."""

    def __init__(self, sinks: Mapping[Kind, Sink], tick: Callable[[], None] = lambda: None) -> None:
        self.written = dict.fromkeys(KINDS, 0)
        self.lost = dict.fromkeys(KINDS, 0)
        self._sinks = sinks
        self._tick = tick
        self._lines: deque[AuditRecord] = deque()
        self._changed = threading.Condition()
        self._is_writing = False
        self._stopping = False
        self.failed: set[Kind] = set()
        """The kinds whose last lines could not be written."""
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what is queued and end the thread; give up after `STOP_S`. Blocks."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(STOP_S)

    def flush(self, timeout_s: float = STOP_S) -> bool:
        """Wait until every line so far is written or lost; return False if that takes too long. Blocks."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._is_writing, timeout_s)

    def figures(self) -> dict[str, tuple[int, int]]:
        """Return how many lines were written and lost since the start, by kind."""
        return {kind: (self.written[kind], self.lost[kind]) for kind in KINDS}

    def put(self, line: AuditRecord) -> None:
        """Queue a line, or lose it if the queue is full. Never waits."""
        with self._changed:
            has_room = len(self._lines) < (CHANGES_QUEUED_MAX if line.kind == "change" else DENIALS_QUEUED_MAX)
            if has_room and not self._stopping:
                self._lines.append(line)
                self._changed.notify_all()
                return
        self._lose([line], "the queue of lines is full")

    def _run(self) -> None:
        while not self._is_done():
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._stopping, TICK_S)
                lines, self._is_writing = list(self._lines), True
                self._lines.clear()
            try:
                self._tick()
                for batch in _batches(lines):
                    self._write(batch)
            except Exception:  # whatever it is, later lines are to be written
                logger.exception("the audit lost lines")
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
        for sink in self._sinks.values():
            sink.close()

    def _is_done(self) -> bool:
        with self._changed:
            return self._stopping and not self._lines

    def _write(self, lines: list[AuditRecord]) -> None:
        kind = lines[0].kind
        try:
            self._sinks[kind].append("".join(f"{line.text}\n" for line in lines).encode())
        except (OSError, ValueError) as error:  # ValueError: stdout is closed
            if kind not in self.failed:  # said once until it works again: a full disk must not fill the log too
                self.failed.add(kind)
                logger.error("the audit of %ss cannot be written: %s; serving goes on without it", kind, error)
            self._lose(lines, str(error))
            self._sinks[kind].close()
            return
        self.written[kind] += len(lines)
        if kind in self.failed:
            self.failed.remove(kind)
            logger.warning("the audit of %ss is written again; %d are lost", kind, self.lost[kind])
        _tell(lines, True)

    def _lose(self, lines: list[AuditRecord], why: str) -> None:
        """Count lost lines. Changes, which are few, are written into the process's log instead."""
        for line in lines:
            with self._changed:
                self.lost[line.kind] += 1
            if line.kind == "change":
                logger.error("the audit lost this change (%s): %s", why, line.text)
        _tell(lines, False)


def _batches(lines: list[AuditRecord]) -> Iterator[list[AuditRecord]]:
    """Yield runs of lines of one kind, each of up to `BATCH_BYTES`."""
    for kind in KINDS:
        batch: list[AuditRecord] = []
        size_bytes = 0
        for line in lines:
            if line.kind != kind:
                continue
            if batch and size_bytes + len(line.text) > BATCH_BYTES:
                yield batch
                batch, size_bytes = [], 0
            batch.append(line)
            size_bytes += len(line.text)
        if batch:
            yield batch


def _tell(lines: list[AuditRecord], is_written: bool) -> None:
    for line in lines:
        if line.told is not None:
            line.told(is_written)


# Reading.


def denials_file(path: Path) -> Path:
    """Return the file of the denials beside that of the changes."""
    return path.with_suffix(f".denials{path.suffix}")


def rotated_files(path: Path) -> list[Path]:
    """Return the full files of a rotating file, the oldest first."""
    return sorted(path.parent.glob(f"{escape(path.stem)}.{'[0-9]' * DIGITS}{escape(path.suffix)}"))


def read(path: Path, since: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of both kinds since a time (Unix seconds), in their order, as text and as the object.

    A line that a kill has cut is left out. Raises Misused(STATE_INCOMPATIBLE) at a line of another format.
    """
    parts = [_read_one(file, since) for file in (path, denials_file(path))]
    return heapq.merge(*parts, key=lambda line: str(line[1]["time"]))


def _read_one(path: Path, since: float) -> Iterator[tuple[str, dict[str, Any]]]:
    current: BinaryIO | None = None
    with suppress(FileNotFoundError):
        current = path.open("rb")  # first: if it is rotated now, it is among the others, and known by its inode
    for file in rotated_files(path):
        try:
            opened = file.open("rb")
        except FileNotFoundError:
            continue  # the oldest has just gone
        with opened:
            status = os.fstat(opened.fileno())
            if status.st_mtime >= since and not (
                current is not None and os.path.samestat(status, os.fstat(current.fileno()))
            ):
                yield from _lines_of(opened, since)
    if current is not None:
        with current:
            yield from _lines_of(current, since)


def _lines_of(file: BinaryIO, since: float) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in file:
        try:
            found = json.loads(line)
            at = datetime.fromisoformat(found["time"]).timestamp()
        except (ValueError, LookupError, TypeError):
            continue
        if found.get("format") != FORMAT:
            raise other_format(f"the audit in {file.name}", found.get("format", "0, which no number means"), FORMAT)
        if at >= since:
            yield line.decode().rstrip("\n"), found
