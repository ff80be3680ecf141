"""Folders of entries by content address: an entry is whole or absent, however the process ends.

An entry, a folder or a file, is made in a work folder on the same file system, flushed, and renamed to its key; then
the folder that holds it is flushed. It is renamed back into the work folder to remove it, which is quick: the removal
itself may follow in a thread. What a killed process leaves in its work folder is removed by a later one.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER_MODE, FILE_MODE = 0o755, 0o644
"""An engine may run as another user."""


class Files:
    """The file operations that durability rests on; a test puts a crash before, or a failure in place of, any."""

    def write_file(self, path: Path, pieces: Iterable[bytes | memoryview], mode: int = FILE_MODE) -> None:
        """Write a new file, flushed to the disk."""
        descriptor = self.create(path, mode)
        try:
            for piece in pieces:
                self.write(descriptor, memoryview(piece))
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def create(self, path: Path, mode: int) -> int:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        os.fchmod(descriptor, mode)  # the mode of `open` is subject to the umask
        return descriptor

    def make_directory(self, path: Path, mode: int = FOLDER_MODE) -> None:
        path.mkdir()
        path.chmod(mode)

    def link(self, source: Path, target: Path) -> None:
        target.hardlink_to(source)

    def write(self, descriptor: int, data: memoryview) -> None:
        while data:
            data = data[os.write(descriptor, data) :]

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Entries:
    """The entries of `directory`, which are made and removed in `work`. Every method blocks and may raise OSError."""

    def __init__(self, directory: Path, work: Path, files: Files | None = None) -> None:
        self.directory = directory
        self.work = work
        self.files = files or Files()

    def path(self, key: str) -> Path:
        """Return the path of an entry, which may not exist."""
        return self.directory / key

    def make(self) -> Path:
        """Return a new empty folder for an entry that is being made; pass it to `discard` afterwards."""
        try:
            return Path(tempfile.mkdtemp(dir=self.work))
        except FileNotFoundError:
            self.work.mkdir(exist_ok=True)
            return Path(tempfile.mkdtemp(dir=self.work))

    def put(self, made: Path, key: str) -> Path:
        """Move a flushed folder or file in as an entry, and return its path."""
        self.files.rename(made, self.path(key))
        self.files.sync_directory(self.directory)
        return self.path(key)

    def take_out(self, key: str) -> Path | None:
        """Move an entry into a new work folder and return that, for `discard`; None if there is no such entry."""
        gone = self.make()
        try:
            self.files.rename(self.path(key), gone / key)
        except OSError as error:
            gone.rmdir()
            if isinstance(error, FileNotFoundError):
                return None
            raise
        return gone

    def remove(self, key: str) -> None:
        """Remove an entry, if it is there. A file is unlinked where it is, which a full disk allows, too."""
        if self.path(key).is_file():
            self.files.unlink(self.path(key))
            return
        gone = self.take_out(key)
        if gone is not None:
            self.discard(gone)

    def discard(self, path: Path) -> None:
        """Remove a folder or file for good, if it is still there. A failure is logged; the next start tries again."""
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:  # a disk that has become read-only must not end the caller's work
            logger.warning("%s could not be removed: %s", path, error.strerror)

    def clear(self) -> None:
        """Remove all that is in the work folder, which no other process may be using."""
        for left in list(self.work.iterdir()) if self.work.is_dir() else ():
            self.discard(left)
