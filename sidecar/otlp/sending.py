"""A thread that makes spans of ended requests and sends them. What comes too fast for it is dropped and counted."""

from __future__ import annotations

import logging
from collections import deque
from threading import Event, Thread
from time import monotonic, sleep

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from sidecar.otlp.spans import Spans
from sidecar.telling.record import Record

logger = logging.getLogger(__name__)

QUEUED_MAX = 2_048
"""Ended requests that wait for the thread."""
BATCH_SPANS = 128
"""A batch is encoded at once, and while it is the event loop does not run."""
EVERY_S = 1.0
STOP_S = 3.0


class Sender:
    """Takes the records of ended requests on the event loop, and sends their spans from a thread.

    `sent`, `failed` and `dropped` count requests whose spans were received, were not, and were never made.
    """

    def __init__(self, exporter: SpanExporter, resource: Resource) -> None:
        self.sent = self.failed = self.dropped = 0
        self._exporter = exporter
        self._resource = resource
        self._records: deque[Record] = deque()
        self._stops = Event()
        self._thread = Thread(target=self._run, name="traces", daemon=True)

    def figures(self) -> dict[str, int]:
        return {"sent": self.sent, "failed": self.failed, "dropped": self.dropped}

    def start(self) -> None:
        self._thread.start()

    def take(self, record: Record) -> None:
        """Queue a record; never waits."""
        if len(self._records) >= QUEUED_MAX:
            self.dropped += 1
            return
        self._records.append(record)

    def stop(self) -> None:
        """Send what is queued, for `STOP_S` at most."""
        self._stops.set()
        self._thread.join(STOP_S)
        self._exporter.shutdown()

    def _run(self) -> None:
        while not self._stops.wait(EVERY_S):
            while self._records and not self._stops.is_set():
                self._send_batch()
        until_s = monotonic() + STOP_S
        while self._records and monotonic() < until_s:
            self._send_batch()

    def _send_batch(self) -> None:
        spans: list[ReadableSpan] = []
        requests = 0
        while self._records and len(spans) < BATCH_SPANS:
            try:
                spans += Spans(self._records.popleft(), self._resource).made()
                requests += 1
            except Exception:
                self.failed += 1
                logger.exception("a request has no trace: its spans could not be made")
            sleep(0)  # gives the interpreter to the event loop, which would wait for it for milliseconds
        try:
            result = self._exporter.export(spans)
        except Exception:
            logger.exception("%s traces could not be sent", requests)
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            self.sent += requests
        else:
            self.failed += requests
