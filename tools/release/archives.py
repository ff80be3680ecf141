"""Archives and checksums that depend on the files alone: names in order, one time, no owner."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
from pathlib import Path

SUMS = "SHA256SUMS"


def pack(folder: Path, target: Path, epoch: int) -> Path:
    """Write a folder as a gzipped tar archive that holds it under its own name; return the archive."""
    with (
        target.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=epoch) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
                archive.add(path, name, filter=lambda member: _plain(member, epoch))
    return target


def repack(archive: Path, scratch: Path, epoch: int) -> None:
    """Write a gzipped tar archive anew in place. It holds one folder."""
    with tarfile.open(archive) as opened:
        opened.extractall(scratch, filter="data")
    (folder,) = scratch.iterdir()
    pack(folder, archive, epoch)


def digest(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over all files of a folder, as `sha256sum --check` reads it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / SUMS]
    lines = [f"{digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS).write_text("".join(lines))


def _plain(member: tarfile.TarInfo, epoch: int) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mtime = epoch
    member.mode = 0o755 if member.mode & 0o100 else 0o644
    return member
