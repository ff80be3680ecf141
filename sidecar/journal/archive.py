"""An incident archive: its layout, and how to open one without trusting it.

An archive comes from another machine by mail or chat, so nothing in it is trusted. Only regular files named as journal
segments are written, into a new folder. A name that leads elsewhere, a link, a device or a sparse file makes the whole
archive invalid. Bytes are counted as they are decompressed, headers included.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from sidecar.errors import Misused, Reason

FORMAT = 1
MANIFEST = "manifest.json"
UNPACKED_BYTES_MAX = 2 << 30
MEMBERS_MAX = 4096
HEADER_BYTES_MAX = 1 << 20
"""Limit for one member: a long name is a header of its own, and a hostile one could take gigabytes."""
PIECE_BYTES = 1 << 20

_GZIP_MAGIC = b"\x1f\x8b"
_SEGMENT = re.compile(r"segment-\d{1,20}\.jsonl\Z")


def is_archive(path: Path) -> bool:
    """Return True if a file is compressed: an incident archive is, a segment is not."""
    try:
        with path.open("rb") as file:
            return file.read(2) == _GZIP_MAGIC
    except OSError:
        return False  # opening it later reports the reason


@contextmanager
def opened(path: Path, bytes_max: int = UNPACKED_BYTES_MAX) -> Iterator[Path]:
    """Yield the folder with a path's journal. An archive is unpacked into a temporary one while this is open.

    Any other path is yielded as it is. Raises Misused(NOT_A_JOURNAL) for an archive that is damaged or hostile, or that
    unpacks to more than `bytes_max`.
    """
    if path.is_dir() or not is_archive(path):
        yield path
        return
    with TemporaryDirectory(prefix="sidecar-incident-") as folder:
        unpack(path, Path(folder), bytes_max)
        yield Path(folder)


def unpack(path: Path, folder: Path, bytes_max: int = UNPACKED_BYTES_MAX) -> list[Path]:
    """Write an archive's journal segments into a folder and return them in the archive's order. Raises Misused."""
    try:
        with gzip.open(path) as compressed:
            segments = list(_segments(path, compressed, folder, bytes_max))
            # The checksum is behind the padding, which a tar reader need not read.
            if len(compressed.read(tarfile.RECORDSIZE + 1)) > tarfile.RECORDSIZE:
                raise _bad(path, "there is data after its end; have it sent again, or capture it again")
            return segments
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise _bad(path, f"it is damaged ({error}); have it sent again, or capture it again") from error


class _Counted:
    """A stream that raises once it has given more bytes than allowed."""

    def __init__(self, path: Path, stream: gzip.GzipFile) -> None:
        self._path = path
        self._stream = stream
        self._left_bytes = 0

    def allow(self, size_bytes: int) -> None:
        self._left_bytes = size_bytes + HEADER_BYTES_MAX

    def read(self, size_bytes: int = -1) -> bytes:
        piece = self._stream.read(min(size_bytes, PIECE_BYTES) if size_bytes >= 0 else PIECE_BYTES)
        self._left_bytes -= len(piece)
        if self._left_bytes < 0:
            raise _bad(self._path, "one of its headers is larger than any that sidecar debug capture writes")
        return piece


def _segments(path: Path, compressed: gzip.GzipFile, folder: Path, bytes_max: int) -> Iterator[Path]:
    counted = _Counted(path, compressed)
    counted.allow(0)
    left_bytes, found = bytes_max, 0
    with tarfile.open(fileobj=counted, mode="r|") as archive:  # type: ignore[call-overload]
        for number in range(MEMBERS_MAX + 1):
            counted.allow(0)
            member = archive.next()
            if member is None:
                break
            if number == MEMBERS_MAX:
                raise _bad(path, f"it has more than {MEMBERS_MAX} members")
            _check_member(path, member)
            left_bytes -= member.size
            if left_bytes < 0:
                raise _bad(path, f"it unpacks to more than {bytes_max} bytes; unpack it yourself and replay the folder")
            counted.allow(member.size)
            target = _target(member, folder)
            _take(archive, member, target)
            if target is not None:
                found += 1
                yield target
    counted.allow(0)
    while counted.read():  # up to the checksum at the very end
        pass
    if not found:
        raise _bad(path, "there is no journal/segment-*.jsonl in it; it was captured without a journal")


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    """Raise Misused for a member that `sidecar debug capture` never writes."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name:
        raise _bad(path, f'a member of it leads out of the folder ("{member.name[:80]}")')
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise _bad(path, f'a member of it is no plain file ("{member.name[:80]}")')


def _target(member: tarfile.TarInfo, folder: Path) -> Path | None:
    """Return where a segment is written; None for a member that is no segment."""
    name = PurePosixPath(member.name)
    if member.isdir() or name.parent.name != "journal" or not _SEGMENT.match(name.name):
        return None
    return folder / name.name


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path | None) -> None:
    """Read a member to its end, into a new file if it is wanted."""
    content = archive.extractfile(member)
    if content is None:
        return
    if target is None:
        while content.read(PIECE_BYTES):
            pass
        return
    try:
        file = target.open("xb")
    except FileExistsError as error:
        raise tarfile.ReadError(f"{member.name} is in it twice") from error
    with file:
        while piece := content.read(PIECE_BYTES):
            file.write(piece)


def _bad(path: Path, problem: str) -> Misused:
    return Misused(Reason.NOT_A_JOURNAL, f"{path} cannot be replayed: {problem}")
