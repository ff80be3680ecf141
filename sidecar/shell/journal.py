"""The journal: every event that the core took, so that its decisions can be had again, byte for byte.

Ids, names, lengths and times only; no prompt, token or weight ever enters the core, so none can be written here. A
step costs the event loop one short encoding; files are a thread's business. When that thread cannot keep up or the
disk fails, steps are left out and a new segment is begun with a fresh state: there is never a hole inside a segment,
and the event loop never waits. A crash loses what was queued for the thread, about a tenth of a second.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sidecar.core import codec
from sidecar.core.core import Core
from sidecar.core.effects import Effect
from sidecar.core.events import Event
from sidecar.shell.segments import Opening, SegmentWriter, effects_digest
from sidecar.shell.snapshot import snapshot_of

QUEUED_BYTES_MAX = 32 << 20
RETRY_NS = 10_000_000_000


@dataclass(frozen=True)
class JournalFigures:
    """What the metrics tell of the journal, counted since the start."""

    written_bytes: int
    segments: int
    gaps: int
    errors: int


class Journal:
    """An observer that records every step of a core.

    `segment_bytes` bounds a segment's steps and state together; where the state alone is more than half of that, as
    many bytes of steps as of state are written before the next. `segments_max` segments are kept.
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
        return JournalFigures(writer.written_bytes, self._segments, self._gaps, writer.errors)

    def start(self) -> None:
        """Begin the first segment with the core as it is now; call it between steps."""
        self._writer.start()
        self._begin()

    def stop(self) -> None:
        """Write what is queued. Blocks until it is written."""
        self._writer.stop()

    def flush(self) -> None:
        """Wait until every step so far is in its file. Blocks."""
        self._writer.flush()

    def observed(self, event: Event, effects: Sequence[Effect], now_ns: int) -> None:
        """Record a step, or look whether recording can be taken up again."""
        self._steps += 1
        if self._writer.failed and self._recording:
            self._interrupt(now_ns + RETRY_NS)
        if not self._recording:
            self._resume(now_ns)
            return
        line = _step_line(event, effects, now_ns)
        if not self._writer.append(line):
            self._interrupt(now_ns)
            return
        self._steps_bytes += len(line)
        if self._is_full():
            self._begin()

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
        """Begin anew after a gap, once the thread has caught up and a failed disk has had time to be seen to."""
        if self._writer.idle and now_ns >= self._resume_ns:
            self._begin()


def _step_line(event: Event, effects: Sequence[Effect], now_ns: int) -> bytes:
    record = {"at": now_ns, "event": codec.encode(event), "effects": effects_digest(effects)}
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"
