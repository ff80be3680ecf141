"""Stage adapters as files in a folder that engines read, for engines that load from a path.

A version lies in `<folder>/<key>/`: `adapter_config.json` and the safetensors, nothing else, as PEFT saved them or, for
engines that need it, rewritten (`canonical.py`). It gets that name by a rename after all files are on the disk, so it
is complete or absent, however the process ends. Several sidecars may share a folder; `claims.py` explains how they
avoid removing each other's versions.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sidecar.adapters import peft_config
from sidecar.adapters.builder import check_digest
from sidecar.adapters.canonical import rewrite
from sidecar.adapters.claims import Claims
from sidecar.adapters.entries import Files
from sidecar.adapters.folder import Folder, opened
from sidecar.adapters.peft import INDEX_FILE_NAME, WEIGHTS_FILE_NAME, AdapterSource, read_adapter
from sidecar.adapters.spool import digest_of_folder
from sidecar.adapters.strict_json import parse_object
from sidecar.core.layout import Layout
from sidecar.errors import Reason, Refused

AS_SAVED = Layout("float16", files=True)
OTHERS_READ = 0o004


@dataclass(frozen=True)
class AdaptersDir:
    """One folder under two paths: `ours` is this process's path of it, `engine` the engine's."""

    ours: Path
    engine: str

    def engine_path(self, key: str) -> str:
        """Return the engine's path of a staged version."""
        return f"{self.engine.rstrip('/')}/{key}"

    def ours_of(self, engine_path: str) -> Path | None:
        """Return our path of a folder by the engine's; None if it is not in this one. Blocks.

        An engine may tell paths with all links resolved, so this folder is looked for by its resolved path, too, as far
        as this process sees the same links.
        """
        for known in (self.engine, os.path.realpath(self.engine), os.path.realpath(self.ours)):
            within = f"{known.rstrip('/')}/"
            if engine_path.startswith(within):
                return self.ours / engine_path.removeprefix(within)
        return None


@dataclass(frozen=True)
class _Mark:
    """Identifies a staged file. The time counts too: a hard link shares its source's bytes, which may be rewritten."""

    inode: int
    size_bytes: int
    changed_ns: int


class Staging:
    """One process's versions in one folder. Every method blocks: call it in a thread, one call at a time per key."""

    def __init__(self, directory: Path, files: Files | None = None) -> None:
        self.directory = directory
        self._claims = Claims(directory, files)
        self._entries = self._claims.entries
        self._files = self._entries.files
        self._marks: dict[str, Mapping[str, _Mark]] = {}
        self._lock = threading.Lock()

    def open(self) -> None:
        """Join the folder; versions that nobody needs stay until `sweep`. Makes the folder if its parent exists.

        Raises Misused if the folder cannot be used.
        """
        self._claims.open()

    def sweep(self) -> None:
        """Remove versions that nobody needs, such as those of a process that was killed. Raises OSError."""
        self._claims.sweep()

    def close(self, as_dead: bool = False) -> None:
        """Release every version and leave the folder; or leave all in it for the `sweep` of a later process."""
        self._claims.close(as_dead)

    def path(self, key: str) -> Path:
        """Return the path of a staged version, which may not exist."""
        return self._entries.path(key)

    def is_whole(self, key: str) -> bool:
        """Return True if this process staged the version and its files are unchanged, by their metadata."""
        with self._lock:
            marks = self._marks.get(key)
        try:
            return marks is not None and _marks_of(self.path(key), marks) == marks
        except OSError:
            return False

    def stage(
        self, source: Path | Folder, key: str, digest: str, layout: Layout = AS_SAVED, *, link: bool = False
    ) -> Path:
        """Stage the version in the folder `source`, unless it is staged already, and return its path.

        `link` allows hard links where the file system does: set it for sources whose files are never rewritten. Raises
        Invalid if the folder holds other content or cannot be written in the layout, Refused if there is no room;
        neither leaves anything behind.
        """
        if self.is_whole(key):
            return self.path(key)
        try:
            with self._claimed(key):
                before = _inode(self.path(key))
                if before is None or layout.canonical or digest_of_folder(self.path(key)) != digest:
                    self._put(source, key, digest, layout, link, before)
                marks = _marks_of(self.path(key), _file_names(self.path(key)))
        except OSError as error:
            raise _no_room(self.directory, digest, error) from error
        with self._lock:
            self._marks[key] = marks
        return self.path(key)

    def remove(self, key: str) -> None:
        """Release a version, and remove it if nobody else claims it. Raises OSError if it cannot be moved."""
        with self._lock:
            self._marks.pop(key, None)
        self._claims.release(key)

    @contextmanager
    def _claimed(self, key: str) -> Iterator[None]:
        """Claim a version, and release it again if staging fails."""
        self._claims.claim(key)
        try:
            yield
        except BaseException:
            self.remove(key)
            raise

    def _put(
        self, source: Path | Folder, key: str, digest: str, layout: Layout, link: bool, before: int | None
    ) -> None:
        work = self._entries.make()
        try:
            with opened(source, digest[:12]) as folder, read_adapter(folder, name=digest[:12]) as adapter:
                check_digest(adapter.name, adapter.digest, digest)
                self._fill(work / key, layout, adapter, folder.path if link else None)
            # An engine may be about to read what is there, so equal files stay.
            if before is None or digest_of_folder(work / key) != digest_of_folder(self.path(key)):
                self._move_in(work, key, before)
        finally:
            self._entries.discard(work)

    def _fill(self, made: Path, layout: Layout, adapter: AdapterSource, linked: Path | None) -> None:
        """Write what was hashed, from the files that are open; those in the folder `linked` may be linked to."""
        self._files.make_directory(made)
        if not (layout.canonical and rewrite(adapter, layout, made, self._files)):
            contents = {name: iter([data]) for name, data in adapter.documents.items()}
            for name, pieces in (contents | {file.name: file.pieces() for file in adapter.file.files}).items():
                if linked is None or not self._linked((linked / name).resolve(), made / name):
                    self._files.write_file(made / name, pieces)
        adapter.file.check_unchanged()
        self._files.sync_directory(made)

    def _linked(self, source: Path, target: Path) -> bool:
        """Make a hard link if the file system and the source's mode, which the link shares, allow it."""
        if not source.stat().st_mode & OTHERS_READ:
            return False
        try:
            self._files.link(source, target)
        except OSError:  # another file system, too many links, or another user's file: the caller copies it
            return False
        return True

    def _move_in(self, work: Path, key: str, before: int | None) -> None:
        """Rename a prepared version to its key. An inode seen `before` is damaged; a newer one is sound and stays."""
        with self._claims.alone():
            now = _inode(self.path(key))
            if now is not None and now != before:
                return
            if now is not None:
                self._files.rename(self.path(key), work / "damaged")
            self._entries.put(work / key, key)


def _file_names(folder: Path) -> list[str]:
    """Return the names of the files of an adapter that `read_adapter` accepts."""
    if (folder / WEIGHTS_FILE_NAME).exists():
        return [peft_config.FILE_NAME, WEIGHTS_FILE_NAME]
    index = parse_object((folder / INDEX_FILE_NAME).read_bytes())
    return [peft_config.FILE_NAME, INDEX_FILE_NAME, *sorted(frozenset(index["weight_map"].values()))]


def _marks_of(folder: Path, names: Iterable[str]) -> dict[str, _Mark]:
    found = {name: (folder / name).stat() for name in names}
    return {name: _Mark(stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _no_room(directory: Path, digest: str, error: OSError) -> Refused:
    return Refused(
        Reason.ADAPTER_UNAVAILABLE,
        f"the files of {digest[:12]} cannot be put into adapters_dir {directory}: {error.strerror or error}; free some "
        "room there, or let this process write to it",
    )
