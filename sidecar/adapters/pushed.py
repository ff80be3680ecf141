"""Receive files that a client pushes: check the announcement, write the chunks, and verify the checksums."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from sidecar.adapters.names import shown
from sidecar.adapters.origins.download import check_room
from sidecar.adapters.origins.failures import no_room, too_large
from sidecar.adapters.origins.files import (
    CONFIG_FILE_NAME,
    INDEX_FILE_NAME,
    PROBE_FILE_NAME,
    WEIGHTS_FILE_NAME,
    is_file_name,
)
from sidecar.adapters.origins.limits import Limits
from sidecar.errors import Reason, Refused

CHUNK_BYTES_MAX = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True)
class PushedFile:
    """A file as the client announces it."""

    name: str
    size_bytes: int
    sha256: str


def check_announced(name: str, files: Sequence[PushedFile], limits: Limits) -> None:
    """Raise Refused or Invalid unless the files can make an adapter within the limits."""
    names = [file.name for file in files]
    if len(files) > limits.shards_max + 3 or len(dict.fromkeys(names)) != len(names):
        raise wrong(name, f"it lists {len(files)} files, too many or one of them twice")
    for file in files:
        if not is_file_name(file.name):
            raise wrong(name, f"{shown(file.name)} is no file of an adapter")
        if not _SHA256.match(file.sha256):
            raise wrong(name, f"{file.name} has no sha256 of 64 lower-case hex digits")
        if file.size_bytes > _bytes_max(file.name, limits):
            raise too_large(f"{name}: {file.name}", file.size_bytes, _bytes_max(file.name, limits))
    for needed in (CONFIG_FILE_NAME, INDEX_FILE_NAME if INDEX_FILE_NAME in names else WEIGHTS_FILE_NAME):
        if needed not in names:
            raise wrong(name, f"{needed} is not among the files")
    total_bytes = sum(file.size_bytes for file in files)
    if total_bytes > limits.size_bytes_max:
        raise too_large(f"{name}: all files together", total_bytes, limits.size_bytes_max)


def _bytes_max(name: str, limits: Limits) -> int:
    small = {
        CONFIG_FILE_NAME: limits.config_bytes_max,
        INDEX_FILE_NAME: limits.index_bytes_max,
        PROBE_FILE_NAME: limits.probe_bytes_max,
    }
    return small.get(name, limits.size_bytes_max)


def wrong(name: str, why: str) -> Refused:
    """Return the error for a client that breaks the push protocol."""
    return Refused(Reason.INVALID_REQUEST, f"push of {shown(name)}: {why}", adapter=name[:128])


class Receiver:
    """Writes announced files into a folder, in order. Blocks: its methods run in a thread, one at a time."""

    def __init__(self, name: str, files: Sequence[PushedFile], folder: Path) -> None:
        self._name = name
        self._files = files
        self._folder = folder
        self._number = 0
        self._offset = 0
        self._file: FileIO | None = None
        """Unbuffered: bytes that a full disk refused would fail again when the file is closed."""
        self._sha256 = hashlib.sha256()
        check_room(folder, sum(file.size_bytes for file in files), name)

    def take(self, number: int, offset: int, data: bytes) -> None:
        """Append a chunk. Raises Refused if it is not the next one, is too long, or does not fit on the disk."""
        self._end_files()
        if self._number == len(self._files):
            raise wrong(self._name, "more is sent than was announced")
        announced = self._files[self._number]
        if (number, offset) != (self._number, self._offset):
            raise wrong(
                self._name, f"file {number} at {offset} is sent and {self._number} at {self._offset} comes next"
            )
        if not data or len(data) > CHUNK_BYTES_MAX:
            raise wrong(self._name, f"a chunk has {len(data)} bytes; it has 1 to {CHUNK_BYTES_MAX}")
        if offset + len(data) > announced.size_bytes:
            raise wrong(self._name, f"more of {announced.name} is sent than the {announced.size_bytes} bytes announced")
        try:
            if self._file is None:
                self._file = (self._folder / announced.name).open("xb", buffering=0)
            _write_all(self._file, data)
        except OSError as error:
            raise no_room(f"{self._name}: {announced.name}", error) from error
        self._sha256.update(data)
        self._offset += len(data)

    def finish(self) -> None:
        """End the push. Raises Refused unless every announced byte was received."""
        self._end_files()
        if self._number < len(self._files):
            announced = self._files[self._number]
            raise wrong(
                self._name, f"it ended after {self._offset} of {announced.size_bytes} bytes of {announced.name}"
            )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _end_files(self) -> None:
        """Verify, flush and close each complete file, empty ones included, which have no chunk of their own."""
        while self._number < len(self._files) and self._offset == self._files[self._number].size_bytes:
            announced = self._files[self._number]
            if self._sha256.hexdigest() != announced.sha256:
                raise wrong(self._name, f"{announced.name} does not have the sha256 that was announced; send it again")
            self._sync(announced)
            self._number, self._offset, self._sha256 = self._number + 1, 0, hashlib.sha256()

    def _sync(self, announced: PushedFile) -> None:
        try:
            if self._file is None:
                (self._folder / announced.name).touch()
                return
            os.fsync(self._file.fileno())
        except OSError as error:
            raise no_room(f"{self._name}: {announced.name}", error) from error
        self.close()


def _write_all(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
