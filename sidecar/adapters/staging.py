"""Adapters as files, in a folder that engines read: for engines that load from a path instead of taking weights.

A version lies in `<folder>/<key>/` as PEFT saved it: `adapter_config.json` and the safetensors, nothing else. It gets
that name by a rename after all of it is on the disk, so it is whole or not there, whatever ends the process. Several
sidecars may share a folder; `claims.py` says how they keep out of each other's way.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sidecar.adapters import peft_config
from sidecar.adapters.builder import check_digest
from sidecar.adapters.claims import Claims
from sidecar.adapters.durable import DurableFiles
from sidecar.adapters.peft import INDEX_FILE_NAME, WEIGHTS_FILE_NAME, AdapterSource, read_adapter
from sidecar.adapters.spool import digest_of_folder
from sidecar.adapters.strict_json import parse_object
from sidecar.errors import Reason, Refused

CHUNK_BYTES = 1 << 20
FOLDER_MODE, FILE_MODE, OTHERS_READ = 0o755, 0o644, 0o004
"""The engine may be another user."""


@dataclass(frozen=True)
class AdaptersDir:
    """One folder as its two users call it: `ours` is where it is written, `engine` what the engine is told."""

    ours: Path
    engine: str

    def engine_path(self, key: str) -> str:
        """Return the engine's path of a staged version."""
        return f"{self.engine.rstrip('/')}/{key}"


class Files(DurableFiles):
    """The file operations that staging rests on; a test puts a crash before, or a failure in place of, any of them."""

    def make_directory(self, path: Path) -> None:
        path.mkdir()
        path.chmod(FOLDER_MODE)  # whatever the umask says

    def link(self, source: Path, target: Path) -> None:
        target.hardlink_to(source)

    def create(self, path: Path) -> int:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        os.fchmod(descriptor, FILE_MODE)
        return descriptor


@dataclass(frozen=True)
class _Mark:
    """What tells that a file is the one that was staged: a link shares its source's bytes, so its time counts too."""

    inode: int
    size_bytes: int
    changed_ns: int


class Staging:
    """What one process has in one folder. Every method blocks: call them in threads, each key by one at a time."""

    def __init__(self, directory: Path, files: Files | None = None) -> None:
        self.directory = directory
        self._files = files or Files()
        self._claims = Claims(directory, self._files.rename)
        self._marks: dict[str, Mapping[str, _Mark]] = {}
        self._lock = threading.Lock()

    def open(self) -> None:
        """Take part in the folder, which is made if only it is missing, and sweep away what nobody needs any more.

        Raises Misused with what is wrong with the folder.
        """
        self._claims.open()

    def close(self) -> None:
        """Give everything up and leave."""
        self._claims.close()

    def path(self, key: str) -> Path:
        """Return where a version is staged, or would be."""
        return self.directory / key

    def is_whole(self, key: str) -> bool:
        """Whether a version that this process staged is there as it was then: a look at each file, no reading."""
        with self._lock:
            marks = self._marks.get(key)
        try:
            return marks is not None and _marks_of(self.path(key), marks) == marks
        except OSError:
            return False

    def stage(self, source: Path, key: str, digest: str, *, link: bool = False) -> Path:
        """Put the version that a folder holds in its place and return that; nothing is done if it is there already.

        `link` allows hard links where the file system does: for sources whose files are never written to again. Raises
        Invalid if the folder holds other content, Refused for want of room; nothing is left behind then.
        """
        if self.is_whole(key):
            return self.path(key)
        try:
            with self._claimed(key):
                before = _inode(self.path(key))
                if before is None or digest_of_folder(self.path(key)) != digest:
                    self._put(source, key, digest, link, before)
                marks = _marks_of(self.path(key), _file_names(self.path(key)))
        except OSError as error:
            raise _no_room(self.directory, digest, error) from error
        with self._lock:
            self._marks[key] = marks
        return self.path(key)

    def remove(self, key: str) -> None:
        """Give a version up; it goes if nobody else claims it. Raises OSError when it resists."""
        with self._lock:
            self._marks.pop(key, None)
        self._claims.release(key)

    @contextmanager
    def _claimed(self, key: str) -> Iterator[None]:
        """Claim a version, and give it up again if it cannot be staged."""
        self._claims.claim(key)
        try:
            yield
        except BaseException:
            self.remove(key)
            raise

    def _put(self, source: Path, key: str, digest: str, link: bool, before: int | None) -> None:
        work = Path(tempfile.mkdtemp(dir=self._claims.work))
        try:
            with read_adapter(source, name=digest[:12]) as adapter:
                check_digest(adapter, digest)
                self._fill(work / key, source, link, adapter)
            self._move_in(work, key, before)
        finally:
            self._claims.discard(work)

    def _fill(self, made: Path, source: Path, link: bool, adapter: AdapterSource) -> None:
        self._files.make_directory(made)
        for name in _file_names(source):
            file = (source / name).resolve()
            if not (link and self._linked(file, made / name)):
                self._copy(file, made / name)
        adapter.file.check_unchanged()
        self._files.sync_directory(made)

    def _linked(self, source: Path, target: Path) -> bool:
        """Make a hard link if the file system and the file's mode allow it; a link has its source's mode."""
        if not source.stat().st_mode & OTHERS_READ:
            return False
        try:
            self._files.link(source, target)
        except OSError:  # another file system, too many links, or somebody else's file: a copy does as well
            return False
        return True

    def _copy(self, source: Path, target: Path) -> None:
        descriptor = self._files.create(target)
        try:
            with source.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    self._files.write(descriptor, memoryview(chunk))
            self._files.sync(descriptor)
        finally:
            os.close(descriptor)

    def _move_in(self, work: Path, key: str, before: int | None) -> None:
        """Give what was made its name. What was there `before` is damaged; what has come since is sound."""
        with self._claims.alone():
            now = _inode(self.path(key))
            if now is not None and now != before:
                return
            if now is not None:
                self._files.rename(self.path(key), work / "damaged")
            self._files.rename(work / key, self.path(key))
            self._files.sync_directory(self.directory)


def _file_names(folder: Path) -> list[str]:
    """Return the files that make up an adapter which `read_adapter` takes."""
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
