"""Logging that never makes the event loop wait for a terminal or a pipe.

Records go through a bounded queue to a thread that writes them to stderr, as text or as one JSON object a line. If
stderr is too slow, lines are dropped, and the next line that gets through says how many. No line has an API key: of
one that a client writes in place of a name or an id, the key's id is left.
"""

from __future__ import annotations

import atexit
import json
import logging
import queue
import re
import sys
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from typing import Any, Literal, TextIO

from sidecar.access.keys import without_secrets

QUEUED_MAX = 10_000
NOT_UTF8_EVERY_S = 60.0
GRPC_METADATA = "grpc._cython.cygrpc"
"""The logger in gRPC that reports undecodable metadata."""
_PLAIN = re.compile(r"[\w.@:/+-]+\Z")


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
    return text if _PLAIN.match(text) else json.dumps(text)


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


class QueuedHandler(QueueHandler):
    """Hand records to the writing thread without ever waiting for it."""

    def __init__(self, records: queue.Queue[logging.LogRecord]) -> None:
        super().__init__(records)
        self.left_out = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Render the message now, since its arguments may change; the thread formats the rest."""
        if record.args:
            record.msg, record.args = record.getMessage(), None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self.left_out:
                self.queue.put_nowait(_left_out(self.left_out))
                self.left_out = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self.left_out += 1


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

    def __init__(self, handler: QueuedHandler, listener: QueueListener, not_utf8: NotUtf8) -> None:
        self._handler = handler
        self._not_utf8 = not_utf8
        self._listener: QueueListener | None = listener

    def start(self) -> None:
        assert self._listener is not None
        self._listener.start()

    def stop(self) -> None:
        listener, self._listener = self._listener, None
        if listener is None:
            return
        logging.getLogger().removeHandler(self._handler)
        logging.getLogger(GRPC_METADATA).removeFilter(self._not_utf8)
        listener.stop()
        atexit.unregister(self.stop)


def configure_logging(
    log_format: Literal["text", "json"] = "text", level: str = "info", stream: TextIO | None = None
) -> LogWriter:
    """Send all loggers' records to stderr in this format. Return the writer; call its `stop` at the end."""
    written = logging.StreamHandler(stream or sys.stderr)
    text = TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    written.setFormatter(JsonFormatter() if log_format == "json" else text)
    records: queue.Queue[logging.LogRecord] = queue.Queue(QUEUED_MAX)
    handler = QueuedHandler(records)
    not_utf8 = NotUtf8()
    logging.getLogger(GRPC_METADATA).addFilter(not_utf8)
    writer = LogWriter(handler, QueueListener(records, written), not_utf8)
    root = logging.getLogger()
    root.setLevel(level.upper())
    root.addHandler(handler)
    writer.start()
    atexit.register(writer.stop)
    return writer
