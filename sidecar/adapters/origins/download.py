"""Download one file: each attempt resumes where the last one ended, until the file is complete, checked and renamed.

A download in progress is `<name>.part`; a file under its own name is complete, checked and flushed to the disk.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sidecar.adapters.origins.checksums import Checksum, Running, running
from sidecar.adapters.origins.failures import Transient, no_room, too_large, unavailable
from sidecar.adapters.origins.limits import Errand
from sidecar.adapters.origins.remote import Body, Remote, Resume
from sidecar.errors import Reason, Refused


@dataclass
class _Part:
    """The bytes received of a file, and what the next attempt needs to resume."""

    file: IO[bytes]
    offset: int = 0
    furthest: int = 0
    validator: str = ""
    checksum: Checksum | None = None
    running: Running | None = None

    @property
    def resume(self) -> Resume | None:
        return Resume(self.offset, self.validator) if self.offset and self.validator else None


def download(remote: Remote, file_name: str, directory: Path, bytes_max: int, errand: Errand) -> int:
    """Download a file into a directory and return its size in bytes. A failed download leaves nothing behind.

    Raises Missing if the origin lacks the file, Invalid for a permanent failure, Refused for one that may pass.
    """
    path = directory / f"{file_name}.part"
    try:
        with path.open("xb") as file:
            part = _Part(file)
            _attempts(remote, file_name, part, bytes_max, errand)
            file.flush()
            os.fsync(file.fileno())
        path.rename(directory / file_name)
    except BaseException as error:
        with suppress(FileNotFoundError):
            path.unlink()
        if isinstance(error, OSError):
            raise no_room(f"{file_name} of {errand.origin}", error) from error
        raise
    return part.offset


def _attempts(remote: Remote, file_name: str, part: _Part, bytes_max: int, errand: Errand) -> None:
    attempt = failed = 0
    while True:
        reached = part.furthest
        try:
            with remote.open(file_name, part.resume, attempt) as body:
                _begin(part, body, file_name, bytes_max, errand)
                _take(part, body, file_name, bytes_max, errand)
                _check_whole(part, body, file_name)
            return
        except Transient as error:
            attempt += 1
            # An attempt that got further than any before it does not count as a failure.
            failed = 1 if part.furthest > reached else failed + 1
            if failed >= errand.limits.attempts_max:
                raise unavailable(errand.origin, f"{file_name}: {error.why} ({failed} attempts in a row)") from error
            if error.restart:
                part.validator = ""
            errand.pause(failed, error)


def _begin(part: _Part, body: Body, file_name: str, bytes_max: int, errand: Errand) -> None:
    """Prepare for the next chunk: resume, or discard the bytes received so far."""
    if body.size_bytes is not None:
        errand.announce(file_name, body.size_bytes, bytes_max)
        check_room(Path(part.file.name).parent, body.size_bytes - body.offset, file_name)
    if body.offset != part.offset or body.offset == 0:
        errand.advance(body.offset - part.offset)
        part.file.flush()
        part.file.seek(body.offset)
        part.file.truncate()
        part.offset = body.offset
        part.running = running(body.checksum, body.size_bytes)
        part.checksum = body.checksum
    part.validator = body.validator
    left_bytes = None if body.size_bytes is None else body.size_bytes - part.offset
    errand.total_bytes = None if left_bytes is None else errand.done_bytes + left_bytes


def _take(part: _Part, body: Body, file_name: str, bytes_max: int, errand: Errand) -> None:
    assert part.running is not None
    bound = bytes_max if body.size_bytes is None else body.size_bytes
    for chunk in body.chunks:
        if part.offset + len(chunk) > bound:
            raise too_large(file_name, part.offset + len(chunk), bound)
        part.file.write(chunk)
        part.running.update(chunk)
        part.offset += len(chunk)
        part.furthest = max(part.furthest, part.offset)
        errand.advance(len(chunk))


def _check_whole(part: _Part, body: Body, file_name: str) -> None:
    if body.size_bytes is not None and part.offset < body.size_bytes:
        raise Transient(f"it ended after {part.offset} of {body.size_bytes} bytes")
    assert part.running is not None
    if part.checksum is not None and part.running.hexdigest() != part.checksum.value:
        raise Transient(f"{file_name} does not have the {part.checksum.algorithm} that its origin gives", restart=True)


def check_room(directory: Path, missing_bytes: int, what: str) -> None:
    """Raise Refused if the disk has no room for the missing bytes."""
    free_bytes = shutil.disk_usage(directory).free
    if missing_bytes > free_bytes:
        raise Refused(
            Reason.ADAPTER_UNAVAILABLE,
            f"no room for {what} on the disk of the data directory: {missing_bytes} bytes are needed and {free_bytes} "
            "are free; free some or move the data directory",
        )
