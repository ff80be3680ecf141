"""The spool: source folders that were brought here, by digest, and those that are still on their way.

`sources/<digest>` holds whole, checked folders only: each gets its name by a rename, after its files and itself are on
the disk. `incoming/<random>` is for what is under way and is emptied at start, so whatever ends the process leaves
no half folder behind. Without a data directory all of this is in a private temporary one.
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
"""Called with the name of each step that must survive a kill; a test ends the process there."""


class Spool:
    """Folders by digest, for one process; any thread may use it."""

    def __init__(self, directory: Path | None, at: Point = lambda point: None) -> None:
        """Open or make the folders; None: a temporary directory, made when first needed and gone with `close`."""
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
        """Return where a version's source is, or would be."""
        return self.directory / "sources" / digest

    def holds(self, digest: str) -> bool:
        return self._directory is not None and self.folder(digest).is_dir()

    def digests(self) -> list[str]:
        """Return what the spool holds, sorted."""
        if self._directory is None:
            return []
        return sorted(path.name for path in (self._directory / "sources").iterdir() if _DIGEST.match(path.name))

    def make_incoming(self) -> Path:
        """Return a new empty folder for something that is on its way; `remove` or `adopt` it."""
        try:
            return Path(tempfile.mkdtemp(dir=self.directory / "incoming"))
        except OSError as error:
            raise no_room("a new folder", self.directory, error) from error

    def adopt(self, folder: Path, digest: str) -> Path:
        """Make a checked incoming folder the source of a digest and return where it is now.

        If a sound one is there already it stays, with the new one's probe.jsonl, and the new one is removed; a damaged
        one is replaced.
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
            raise no_room(f"the source of {digest[:12]}", self.directory, error) from error
        return target

    def discard(self, digest: str) -> None:
        """Forget a source; nothing happens if it is not there."""
        self.remove(self.take_out(digest))

    def take_out(self, digest: str) -> Path:
        """Move a source, if it is there, into an incoming folder that is to be removed: quick, unlike removing it."""
        gone = self.make_incoming()
        with suppress(FileNotFoundError):
            self.folder(digest).rename(gone / digest)
        return gone

    def remove(self, folder: Path) -> None:
        """Remove an incoming folder that will not be adopted."""
        _remove(folder)


def digest_of_folder(folder: Path) -> str:
    """Return the digest of what a folder holds, "" if it is not a sound adapter. Reads every byte."""
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
    except OSError as error:  # a disk that has become read-only must not end what goes on
        logger.warning("%s could not be removed: %s", folder, error.strerror)
