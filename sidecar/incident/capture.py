"""Capture an incident: one compressed file that can be replayed, explained and read elsewhere.

It contains the journal's recent segments, the configuration and the engines' configs without secrets, the running
process's metrics, and versions; the manifest lists what is missing with the reasons. A journal never contains prompts,
tokens of answers or weights, so neither does a capture. It does contain the names of adapters, tenants and backends, so
only its owner may read the file.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

from sidecar.config import Config
from sidecar.errors import Misused, Reason
from sidecar.incident import parts
from sidecar.incident.finding import began_of
from sidecar.incident.parts import Missing, Part, Segment
from sidecar.journal.archive import FORMAT, MANIFEST

Progress = Callable[[int, int], None]
"""Takes the bytes done and the total."""

HOLDS = (
    "ids, names of adapters, tenants and backends, lengths and times; never prompts, tokens of answers, weights or "
    "secrets: the journal has none of them, and the configuration is redacted"
)
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Wanted:
    """What to capture. Each source may be absent; the manifest then lists it as missing."""

    last: timedelta
    data: Path | None = None
    config: Config | None = None
    http: parts.HttpListener | None = None
    why_not: tuple[tuple[str, str], ...] = ()
    """The sources that the caller could not find, and the reasons."""
    redact_ids: bool = False
    """Whether to remove clients' request ids from the journal."""


def capture(wanted: Wanted, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Write an incident and return its manifest. Works beside a running sidecar, and after its death.

    Raises Misused if every source is missing or `out` exists, and OSError if `out` cannot be written. A failure leaves
    no file behind.
    """
    missing = Missing()
    for what, why in wanted.why_not:
        missing.note(what, why)
    with ExitStack() as stack:
        segments = _journal(wanted, missing)
        for segment in segments:
            stack.callback(segment.file.close)
        gathered, cut = _gathered(wanted, missing)
        if not segments and not gathered:
            reasons = "; ".join(f"{item['what']}: {item['why']}" for item in missing.found)
            raise Misused(Reason.CONFIG_INVALID, f"there is nothing to capture: {reasons}")
        manifest = _manifest(wanted, segments, gathered, cut, missing)
        about = Part(MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode(), "this")
        _write(out, [about, *gathered], segments, progress)
    return manifest


def _journal(wanted: Wanted, missing: Missing) -> list[Segment]:
    segments = [] if wanted.data is None else parts.journal_of(wanted.data, wanted.last, missing)
    return parts.without_ids(segments) if wanted.redact_ids else segments


def _gathered(wanted: Wanted, missing: Missing) -> tuple[list[Part], list[str]]:
    found: list[Part] = []
    cut: list[str] = []
    if wanted.config is not None:
        part, cut = parts.configuration_of(wanted.config)
        found += [part, *parts.engine_configs_of(wanted.config, missing)]
    if wanted.http is not None:
        found += parts.answers_of(wanted.http, missing)
    return found, cut


def _manifest(
    wanted: Wanted, segments: list[Segment], gathered: list[Part], cut: list[str], missing: Missing
) -> dict[str, Any]:
    began = began_of(segments[0].header) if segments else None
    return {
        "incident": FORMAT,
        "captured": _iso(datetime.now(UTC)),
        "asked_for_s": wanted.last.total_seconds(),
        "covers": {"from": _iso(began), "to": _iso(segments[-1].ended if segments else None)},
        "holds": HOLDS.removeprefix("ids, ") if wanted.redact_ids else HOLDS,
        "versions": parts.versions(),
        "journal": [_segment_record(segment) for segment in segments],
        "files": [{"file": part.name, "bytes": len(part.content), "about": part.about} for part in gathered],
        "redacted": [*cut, *(["journal: client_id"] if wanted.redact_ids else [])],
        "missing": missing.found,
    }


def _segment_record(segment: Segment) -> dict[str, Any]:
    return {
        "file": f"journal/{segment.name}",
        "bytes": segment.size_bytes,
        "began": segment.header.get("began"),
        "ended": _iso(segment.ended),
        "version": segment.header.get("version"),
        "first_step": segment.header.get("first_step"),
        "policies": segment.header.get("policies"),
    }


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _write(out: Path, gathered: list[Part], segments: list[Segment], progress: Progress | None) -> None:
    if out.exists():
        raise Misused(Reason.CONFIG_INVALID, f"{out} exists already; name another file with -o")
    unfinished = out.with_name(out.name + UNFINISHED)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=6) as archive:
            _fill(archive, out.name.partition(".")[0] or "incident", gathered, segments, progress)
        unfinished.rename(out)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _fill(
    archive: tarfile.TarFile, folder: str, gathered: list[Part], segments: list[Segment], progress: Progress | None
) -> None:
    for part in gathered:
        archive.addfile(_member(f"{folder}/{part.name}", len(part.content)), io.BytesIO(part.content))
    counted = _Counted(sum(segment.size_bytes for segment in segments), progress)
    for segment in segments:
        counted.file = segment.file
        archive.addfile(_member(f"{folder}/journal/{segment.name}", segment.size_bytes), counted)


def _member(name: str, size_bytes: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = size_bytes, 0o600, int(time.time())
    return member


class _Counted(io.RawIOBase):
    """Reads one file after another and reports the progress."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self.file: IO[bytes] = io.BytesIO()
        self._total_bytes = total_bytes
        self._progress = progress
        self._done_bytes = 0

    def read(self, size_bytes: int = -1) -> bytes:
        piece = self.file.read(size_bytes)
        self._done_bytes += len(piece)
        if self._progress is not None:
            self._progress(self._done_bytes, self._total_bytes)
        return piece
