"""An incident as a file: its layout, and how it is opened again without trusting it.

An archive comes from somebody else's machine by mail or chat, so nothing of it is believed: only regular files that
are named as journal segments are written, into a folder of our own; a name that leads elsewhere, a link, a device or a
sparse file refuses the whole; and bytes are counted as they come out of the compression, headers too.
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
"""Of one member: a long name is a header of its own, and a hostile one could be gigabytes."""
PIECE_BYTES = 1 << 20

_GZIP_MAGIC = b"\x1f\x8b"
_SEGMENT = re.compile(r"segment-\d{1,20}\.jsonl\Z")


def is_archive(path: Path) -> bool:
    """Whether a file is compressed, as an incident is and a segment is not."""
    try:
        with path.open("rb") as file:
            return file.read(2) == _GZIP_MAGIC
    except OSError:
        return False  # whoever opens it next says why


@contextmanager
def opened(path: Path, bytes_max: int = UNPACKED_BYTES_MAX) -> Iterator[Path]:
    """Give the folder in which a path's journal lies: that of an archive is unpacked for as long as this is open.

    Anything but an archive is given as it is. Raises Misused(NOT_A_JOURNAL) for one that is damaged, hostile, or
    unpacks to more than `bytes_max`.
    """
    if path.is_dir() or not is_archive(path):
        yield path
        return
    with TemporaryDirectory(prefix="sidecar-incident-") as folder:
        unpack(path, Path(folder), bytes_max)
        yield Path(folder)


def unpack(path: Path, folder: Path, bytes_max: int = UNPACKED_BYTES_MAX) -> list[Path]:
    """Write an archive's journal segments into a folder and return them, in the archive's order. Raises Misused."""
    try:
        with gzip.open(path) as compressed:
            segments = list(_segments(path, compressed, folder, bytes_max))
            # The checksum stands behind the padding, which a tar's reader need not read.
            if len(compressed.read(tarfile.RECORDSIZE + 1)) > tarfile.RECORDSIZE:
                raise _bad(path, "something follows its end; have it sent again, or capture it again")
            return segments
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise _bad(path, f"it is damaged ({error}); have it sent again, or capture it again") from error


class _Counted:
    """A stream that gives no more bytes than it was last allowed to."""

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
            raise _bad(self._path, "a header of it is larger than any that sidecar debug capture writes")
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
    while counted.read():  # to the checksum at the very end
        pass
    if not found:
        raise _bad(path, "there is no journal/segment-*.jsonl in it; it was captured without a journal")


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    """Raise Misused for a member that `sidecar debug capture` would never write."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name:
        raise _bad(path, f'a member of it leads out of the folder ("{member.name[:80]}")')
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise _bad(path, f'a member of it is no plain file ("{member.name[:80]}")')


def _target(member: tarfile.TarInfo, folder: Path) -> Path | None:
    """Return where a segment is written to; None for what is no segment."""
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
