"""The journal: every event that the core took, so that its decisions can be replayed byte for byte.

It holds ids, names, lengths and times only: no prompt, token or weight enters the core, so none can be written. A step
costs the event loop one short encoding; a thread handles the files. When that thread cannot keep up or the disk fails,
steps are left out and a new segment begins with a fresh state: a segment never has a hole, and the event loop never
waits. A kill loses what was queued for the thread, about a tenth of a second.

When the core raises, the last record holds the exception and its event: a replay raises the same. Nothing is written
after that, and no segment begins with a state that may be half changed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sidecar.core.core import Core
from sidecar.core.effects import Effect
from sidecar.core.events import Event
from sidecar.journal import codec
from sidecar.journal.raised import Raised, describe
from sidecar.journal.segments import Opening, SegmentWriter, effects_digest
from sidecar.journal.snapshot import snapshot_of

logger = logging.getLogger(__name__)

QUEUED_BYTES_MAX = 32 << 20
RETRY_NS = 10_000_000_000


@dataclass(frozen=True)
class JournalFigures:
    """What is reported of the journal, counted since the start; `fails` is True while nothing can be written."""

    written_bytes: int
    segments: int
    gaps: int
    errors: int
    fails: bool


class Journal:
    """An observer that records every step of a core.

    `segment_bytes` bounds a segment's steps and state together. If the state alone is more than half of it, a segment
    takes as many bytes of steps as of state. `segments_max` segments are kept.
    """

    def __init__(
        self,
        core: Core,
        directory: Path,
        segment_bytes: int = 16 << 20,
        segments_max: int = 8,
        queued_bytes_max: int = QUEUED_BYTES_MAX,
    ) -> None:
        self._core = core
        self._segment_bytes = segment_bytes
        self._writer = SegmentWriter(directory, segments_max, queued_bytes_max)
        self._recording = False
        self._resume_ns = 0
        self._steps_bytes = 0
        self._steps = 0
        self._segments = 0
        self._gaps = 0

    @property
    def figures(self) -> JournalFigures:
        writer = self._writer
        return JournalFigures(writer.written_bytes, self._segments, self._gaps, writer.errors, writer.fails)

    def start(self) -> None:
        """Begin the first segment with the core as it is now. Call it between steps."""
        self._writer.start()
        self._begin()

    def stop(self) -> None:
        """Write what is queued. Blocks until it is written."""
        self._writer.stop()

    def flush(self) -> None:
        """Wait until every step so far is in its file. Blocks."""
        self._writer.flush()

    def observed(self, event: Event, effects: Sequence[Effect], now_ns: int) -> None:
        """Record a step, or resume recording after a gap."""
        self._steps += 1
        if self._writer.failed and self._recording:
            self._interrupt(now_ns + RETRY_NS)
        if not self._recording:
            self._resume(now_ns)
            return
        try:
            line = _step_line(event, effects, now_ns)
        except Exception:  # a step that cannot be encoded is left out like one that finds the queue full, and logged
            logger.exception("step %d (%s) cannot be journaled", self._steps, type(event).__name__)
            line = None
        if line is None or not self._writer.append(line):
            self._interrupt(now_ns)
            return
        self._steps_bytes += len(line)
        if self._is_full():
            self._begin()

    def ended(self, raised: Raised) -> None:
        """Write the exception as the last record; the state is no longer one to begin a segment with.

        Its `step` is the step that raised, whose effect raised, or after which ownership raised.
        """
        step, part = self._steps, "ownership"
        what: Any = raised.ownership
        if raised.effect is not None:
            part, what = "effect", raised.effect
        elif raised.event is not None:
            step, part, what = self._steps + 1, "event", raised.event
        record = {"raised": describe(raised.error), "step": step, "at": raised.at_ns}
        try:
            written = codec.dumps(what) if isinstance(what, str) else codec.named(what)
        except Exception:  # the event that raised may be one that cannot be encoded
            logger.exception("the exception that ends the sidecar cannot be journaled in full")
            written = b"null"
        self._writer.end(codec.dumps(record | {part: msgspec.Raw(written)}) + b"\n")

    def _is_full(self) -> bool:
        header_bytes = self._writer.header_bytes
        return self._steps_bytes >= max(self._segment_bytes - header_bytes, header_bytes)

    def _begin(self) -> None:
        self._recording = True
        self._steps_bytes = 0
        self._segments += 1
        self._writer.begin(Opening(snapshot_of(self._core.state), self._steps + 1))

    def _interrupt(self, resume_ns: int) -> None:
        self._recording = False
        self._resume_ns = resume_ns
        self._gaps += 1

    def _resume(self, now_ns: int) -> None:
        """Begin anew after a gap, once the thread has caught up and a failed disk has had time to recover."""
        if self._writer.idle and now_ns >= self._resume_ns:
            self._begin()


def _step_line(event: Event, effects: Sequence[Effect], now_ns: int) -> bytes:
    digest = effects_digest(effects).encode()
    return b'{"at":%d,"event":%s,"effects":"%s"}\n' % (now_ns, codec.named(event), digest)
