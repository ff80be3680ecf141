"""The spool: fetched source folders by digest, and folders that are still being fetched.

`sources/<digest>` holds complete, checked folders only. `incoming/<random>` holds fetches in progress and is emptied at
start. Without a data directory, the spool is in a private temporary one.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from sidecar.adapters.entries import Entries, Files
from sidecar.adapters.origins.failures import no_room
from sidecar.adapters.peft import read_adapter
from sidecar.adapters.probes import FILE_NAME as PROBE_FILE_NAME
from sidecar.errors import SidecarError

_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


class Spool:
    """Folders by digest, for one process; any thread may use it."""

    def __init__(self, directory: Path | None, files: Files | None = None) -> None:
        """Open or make the folders. None stands for a temporary directory, made on first use and removed by `close`."""
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._files = files
        self._lock = threading.Lock()
        self._opened = None if directory is None else self._open(directory)

    def _open(self, directory: Path) -> Entries:
        entries = Entries(directory / "sources", directory / "incoming", self._files)
        for folder in (entries.directory, entries.work):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        entries.clear()
        return entries

    @property
    def entries(self) -> Entries:
        with self._lock:
            if self._opened is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="lora-sidecar-", ignore_cleanup_errors=True)
                self._opened = self._open(Path(self._temporary.name))
            return self._opened

    @property
    def directory(self) -> Path:
        return self.entries.directory.parent

    def close(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def folder(self, digest: str) -> Path:
        """Return the path of a version's source, which may not exist."""
        return self.entries.path(digest)

    def holds(self, digest: str) -> bool:
        return self._opened is not None and self.folder(digest).is_dir()

    def digests(self) -> list[str]:
        """Return the digests that the spool holds, sorted."""
        if self._opened is None:
            return []
        return sorted(path.name for path in self._opened.directory.iterdir() if _DIGEST.match(path.name))

    def make_incoming(self) -> Path:
        """Return a new empty folder for a fetch; pass it to `adopt` or `remove` afterwards."""
        try:
            return self.entries.make()
        except OSError as error:
            raise no_room("a new folder", error) from error

    def adopt(self, folder: Path, digest: str) -> Path:
        """Make a checked incoming folder the source of a digest and return its new path.

        A sound source that is there already stays, takes over the new folder's probe.jsonl, and the new folder is
        removed. A damaged source is replaced.
        """
        target = self.folder(digest)
        try:
            if os.path.lexists(target):
                if digest_of_folder(target) == digest:
                    with suppress(FileNotFoundError):
                        (folder / PROBE_FILE_NAME).replace(target / PROBE_FILE_NAME)
                    self.remove(folder)
                    return target
                self.discard(digest)
            self.entries.files.sync_directory(folder)
            return self.entries.put(folder, digest)
        except OSError as error:
            raise no_room(f"the source of {digest[:12]}", error) from error

    def discard(self, digest: str) -> None:
        """Remove a source, if it is there. Raises OSError if it cannot be moved."""
        self.entries.remove(digest)

    def take_out(self, digest: str) -> Path | None:
        """Move a source, if it is there, into an incoming folder and return that: quicker than removing it."""
        return self.entries.take_out(digest)

    def remove(self, folder: Path) -> None:
        """Remove an incoming folder that will not be adopted."""
        self.entries.discard(folder)


def digest_of_folder(folder: Path) -> str:
    """Return the digest of the adapter in a folder, or "" if it is not a sound adapter. Reads every byte."""
    try:
        with read_adapter(folder) as source:
            return source.digest
    except SidecarError:
        return ""
