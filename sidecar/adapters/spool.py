"""The spool: fetched source folders by digest, and folders that are still being fetched.

`sources/<digest>` holds complete, checked folders only: a folder is flushed to the disk before it is renamed to its
digest. `incoming/<random>` holds fetches in progress and is emptied at start, so a crash leaves no incomplete folder
behind. Without a data directory, the spool is in a private temporary one.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sidecar.adapters.origins.failures import no_room
from sidecar.adapters.peft import read_adapter
from sidecar.adapters.probes import FILE_NAME as PROBE_FILE_NAME
from sidecar.errors import SidecarError

logger = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}\Z")

Point = Callable[[str], None]
"""Takes the name of each point of the spool's work that must survive a kill; a test ends the process there."""


class Spool:
    """Folders by digest, for one process; any thread may use it."""

    def __init__(self, directory: Path | None, at: Point = lambda point: None) -> None:
        """Open or make the folders. None stands for a temporary directory, made on first use and removed by `close`."""
        self._directory = directory
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._at = at
        self._lock = threading.Lock()
        if directory is not None:
            self._open(directory)

    def _open(self, directory: Path) -> None:
        for folder in (directory / "sources", directory / "incoming"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in (directory / "incoming").iterdir():
            _remove(left)

    @property
    def directory(self) -> Path:
        with self._lock:
            if self._directory is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="lora-sidecar-", ignore_cleanup_errors=True)
                self._directory = Path(self._temporary.name)
                self._open(self._directory)
            return self._directory

    def close(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def folder(self, digest: str) -> Path:
        """Return the path of a version's source, which may not exist."""
        return self.directory / "sources" / digest

    def holds(self, digest: str) -> bool:
        return self._directory is not None and self.folder(digest).is_dir()

    def digests(self) -> list[str]:
        """Return the digests that the spool holds, sorted."""
        if self._directory is None:
            return []
        return sorted(path.name for path in (self._directory / "sources").iterdir() if _DIGEST.match(path.name))

    def make_incoming(self) -> Path:
        """Return a new empty folder for a fetch; pass it to `adopt` or `remove` afterwards."""
        try:
            return Path(tempfile.mkdtemp(dir=self.directory / "incoming"))
        except OSError as error:
            raise no_room("a new folder", error) from error

    def adopt(self, folder: Path, digest: str) -> Path:
        """Make a checked incoming folder the source of a digest and return its new path.

        A sound source that is there already stays, takes over the new folder's probe.jsonl, and the new folder is
        removed. A damaged source is replaced.
        """
        target = self.folder(digest)
        try:
            if target.exists():
                if digest_of_folder(target) == digest:
                    with suppress(FileNotFoundError):
                        (folder / PROBE_FILE_NAME).replace(target / PROBE_FILE_NAME)
                    _remove(folder)
                    return target
                self.discard(digest)
            self._at("before folder fsync")
            _sync(folder)
            self._at("before rename")
            folder.rename(target)
            self._at("after rename")
            _sync(target.parent)
        except OSError as error:
            raise no_room(f"the source of {digest[:12]}", error) from error
        return target

    def discard(self, digest: str) -> None:
        """Remove a source, if it is there."""
        self.remove(self.take_out(digest))

    def take_out(self, digest: str) -> Path:
        """Move a source, if it is there, into an incoming folder and return that: quicker than removing it."""
        gone = self.make_incoming()
        with suppress(FileNotFoundError):
            self.folder(digest).rename(gone / digest)
        return gone

    def remove(self, folder: Path) -> None:
        """Remove an incoming folder that will not be adopted."""
        _remove(folder)


def digest_of_folder(folder: Path) -> str:
    """Return the digest of the adapter in a folder, or "" if it is not a sound adapter. Reads every byte."""
    try:
        with read_adapter(folder) as source:
            return source.digest
    except SidecarError:
        return ""


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        folder.unlink(missing_ok=True)
    except OSError as error:  # a disk that has become read-only must not end the caller's work
        logger.warning("%s could not be removed: %s", folder, error.strerror)
