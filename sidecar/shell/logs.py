"""Logging that never makes the event loop wait for a terminal or a pipe.

Records go through a bounded queue to a thread that writes them to stderr, as text or as one JSON object a line. The
thread wakes for a batch: where a wake-up costs more than a line, one a record would be a tenth of a short request. If
stderr is too slow, lines are dropped, and the next line that gets through says how many. No line has an API key: of
one that a client writes in place of a name or an id, the key's id is left.
"""

from __future__ import annotations

import atexit
import json
import logging
import re
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from sidecar.access.keys import without_secrets

QUEUED_MAX = 10_000
BATCH_S = 0.05
"""How long a line may wait for others. A warning is written at once, with all before it."""
LINES_A_WRITE = 64
NOT_UTF8_EVERY_S = 60.0
GRPC_METADATA = "grpc._cython.cygrpc"
"""The logger in gRPC that reports undecodable metadata."""
_PLAIN = re.compile(r"[\w.@:/+-]+\Z")
_NUMBERS = (int, float)


class Fields:
    """A log message with named values: `sentence name=value …` as text, members of the object as JSON."""

    __slots__ = ("sentence", "values")

    def __init__(self, sentence: str, **values: Any) -> None:
        self.sentence = sentence
        self.values = values

    def __str__(self) -> str:
        named = " ".join(f"{name}={_shown(value)}" for name, value in self.values.items() if value not in ("", None))
        return f"{self.sentence} {named}" if named else self.sentence


def _shown(value: Any) -> str:
    text = str(value)
    return text if isinstance(value, _NUMBERS) or text.isalnum() or _PLAIN.match(text) else json.dumps(text)


def _time_of(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _one_line(text: str) -> str:
    """Return a message in which no client's or engine's text can begin a line or move a cursor."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class TextFormatter(logging.Formatter):
    """Text for people: one line a record, followed by its traceback if it has one."""

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).split("\n")  # only a traceback has line breaks
        return without_secrets("\n".join(map(_one_line, lines)))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 — logging's name
        record.message = _one_line(record.message)
        return super().formatMessage(record)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 — logging's name
        return _time_of(record)


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        structured = record.msg if isinstance(record.msg, Fields) else None
        line: dict[str, Any] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": structured.sentence if structured else record.getMessage(),
        }
        if structured:
            line |= structured.values
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return without_secrets(json.dumps(line, separators=(",", ":"), default=str))


class QueuedHandler(logging.Handler):
    """Keep records for the writing thread, without ever waiting for it."""

    def __init__(self, queued_max: int = QUEUED_MAX) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque()
        self.some, self.now = threading.Event(), threading.Event()
        """Set when there are records, and when they are to be written at once."""
        self._queued_max = queued_max
        self._left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record. Its message is rendered now, since its arguments may change; the thread formats the rest."""
        if record.args:
            record.msg, record.args = record.getMessage(), None
        if len(self.records) + bool(self._left_out) >= self._queued_max:
            self._left_out += 1
            return
        if self._left_out:
            self.records.append(_left_out(self._left_out))
            self._left_out = 0
        self.records.append(record)
        if not self.some.is_set():
            self.some.set()
        if record.levelno >= logging.WARNING:
            self.now.set()


def _left_out(count: int) -> logging.LogRecord:
    text = f"{count} log lines were left out: stderr takes them too slowly"
    return logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None)


class NotUtf8(logging.Filter):
    """Reduce gRPC's complaints about metadata that is not UTF-8 to one line a minute, with their number.

    By itself gRPC logs a traceback for each such value, possibly thousands a request, before any handler sees the call.
    """

    def __init__(self, every_s: float = NOT_UTF8_EVERY_S) -> None:
        super().__init__()
        self._every_s = every_s
        self._last_s: float | None = None
        self._count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith("Invalid encoding"):
            return True
        self._count += 1
        if self._last_s is not None and 0 <= record.created - self._last_s < self._every_s:
            return False
        record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        record.msg = "clients sent metadata that is not UTF-8: %d values since the last such line"
        record.args = (self._count,)
        record.exc_info = record.exc_text = None
        self._last_s, self._count = record.created, 0
        return True


class LogWriter:
    """The thread behind the root logger. `stop` writes what is still queued."""

    def __init__(self, handler: QueuedHandler, written: logging.StreamHandler[TextIO], not_utf8: NotUtf8) -> None:
        self._handler = handler
        self._written = written
        self._not_utf8 = not_utf8
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._stopping:
            return
        logging.getLogger().removeHandler(self._handler)
        logging.getLogger(GRPC_METADATA).removeFilter(self._not_utf8)
        self._stopping = True
        self._handler.now.set()
        self._handler.some.set()
        self._thread.join()
        atexit.unregister(self.stop)

    def _run(self) -> None:
        some, now, records = self._handler.some, self._handler.now, self._handler.records
        while not (self._stopping and not records):
            some.wait()
            now.wait(BATCH_S)
            some.clear()  # before the queue is emptied: what comes from here on sets it again
            now.clear()
            while records:
                self._write([records.popleft() for _ in range(min(len(records), LINES_A_WRITE))])

    def _write(self, records: list[logging.LogRecord]) -> None:
        lines = []
        for record in records:
            try:
                lines.append(self._written.format(record))
            except Exception:  # noqa: BLE001 — of anything's text: no line may end the thread
                self._written.handleError(record)
        try:
            self._written.stream.write("\n".join([*lines, ""]))
            self._written.flush()
        except Exception:  # noqa: BLE001 — such as a closed pipe; told as logging's own handlers do
            self._written.handleError(records[0])


def configure_logging(
    log_format: Literal["text", "json"] = "text", level: str = "info", stream: TextIO | None = None
) -> LogWriter:
    """Send all loggers' records to stderr in this format. Return the writer; call its `stop` at the end."""
    written = logging.StreamHandler(stream or sys.stderr)
    text = TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    written.setFormatter(JsonFormatter() if log_format == "json" else text)
    handler = QueuedHandler()
    not_utf8 = NotUtf8()
    logging.getLogger(GRPC_METADATA).addFilter(not_utf8)
    writer = LogWriter(handler, written, not_utf8)
    # What no line shows need not be found out for each record: `logging`'s own advice, in its HOWTO's "Optimization".
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    root = logging.getLogger()
    root.setLevel(level.upper())
    root.addHandler(handler)
    writer.start()
    atexit.register(writer.stop)
    return writer
