"""The disk tier's files: packed blobs that survive a restart, complete or not at all.

A blob is one file: the packed rows, a JSON footer with their layout, the footer's length, and a mark. The footer's
SHA-256 is that of the rows and of the rest of the footer. It is verified when a blob is first read, never at start:
finding 500 blobs reads 500 file tails.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sidecar.adapters.buffers import PRIVATE, Blob, Regions
from sidecar.adapters.builder import Built
from sidecar.adapters.entries import Entries, Files
from sidecar.adapters.layout import Layout
from sidecar.adapters.packed import PackPlan, PackReport
from sidecar.errors import Reason, Refused

SUFFIX = ".blob"
WORK = "incoming"
FILE_MODE = 0o600
MARK = b"LSB2"
CHUNK_BYTES = 1 << 20
_TAIL = struct.Struct("<I4s")


class Found(NamedTuple):
    """A blob that was found at start: its packed key and the bytes of its rows."""

    key: str
    size_bytes: int


class DiskTier:
    """Blobs in one folder. Every method blocks: call them in threads, and never two at a time for one key."""

    def __init__(self, directory: Path, files: Files | None = None) -> None:
        self._entries = Entries(directory, directory / WORK, files)

    def scan(self) -> list[Found]:
        """Remove files that are no blobs and what a crash left unfinished; return the blobs, oldest first."""
        self._entries.directory.mkdir(parents=True, exist_ok=True)
        self._entries.clear()
        found: list[tuple[int, Found]] = []
        for path in sorted(self._entries.directory.iterdir()):
            if not path.is_file() or not path.name.endswith(SUFFIX):
                continue  # not ours, whatever its name
            held = self._found(path)
            if held is None:
                self._entries.discard(path)
            else:
                found.append((path.stat().st_mtime_ns, held))
        return [held for _, held in sorted(found)]

    def write(self, key: str, built: Built) -> None:
        """Write a blob, completely or not at all. Raises OSError if the disk is full, read-only or broken."""
        name, work = _name_of(key), self._entries.make()
        try:
            self._entries.files.write_file(work / name, _with_footer(key, built), FILE_MODE)
            self._entries.put(work / name, name)
        finally:
            self._entries.discard(work)

    def read(self, key: str, layout: Layout, regions: Regions = PRIVATE) -> Built:
        """Read a blob into memory and verify its checksum.

        `layout` is the layout that the key stands for. Raises Refused(ADAPTER_UNAVAILABLE) if the blob is damaged or
        missing.
        """
        try:
            with self._entries.path(_name_of(key)).open("rb") as file:
                size, footer = _read_footer(file.fileno())
                plan = _plan_of(footer, layout)
                if footer["key"] != key or plan.size_bytes != size:
                    raise ValueError("its footer describes another blob")
                blob = Blob(size, regions)
                try:
                    self._fill(blob, file.fileno(), footer, key)
                except BaseException:
                    blob.release()
                    raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(key, str(error)) from error
        return Built(blob, plan, PackReport(packed_key=key))

    def _fill(self, blob: Blob, descriptor: int, footer: dict[str, Any], key: str) -> None:
        digest = hashlib.sha256()
        out = memoryview(blob.array("u1", (blob.size_bytes,)).data)
        for start in range(0, blob.size_bytes, CHUNK_BYTES):
            chunk = out[start : start + CHUNK_BYTES]
            if os.preadv(descriptor, [chunk], start) != len(chunk):
                raise ValueError("it ends early")
            digest.update(chunk)
        chunk.release()
        out.release()
        expected = footer.pop("sha256")
        digest.update(_text(footer))
        if digest.hexdigest() != expected:
            raise _damaged(key, "its checksum is wrong")
        blob.seal()

    def delete(self, key: str) -> None:
        self._entries.remove(_name_of(key))

    def _found(self, path: Path) -> Found | None:
        """Return the blob that a file's tail describes, or None if it is no blob."""
        try:
            with path.open("rb") as file:
                size, _ = _read_footer(file.fileno())
        except (OSError, ValueError):
            return None
        return Found(path.name.removesuffix(SUFFIX), size)


def _name_of(key: str) -> str:
    return f"{key}{SUFFIX}"


def _with_footer(key: str, built: Built) -> Iterator[memoryview]:
    """Yield a blob in chunks, and then its footer."""
    digest = hashlib.sha256()
    data = memoryview(built.blob.array("u1", (built.blob.size_bytes,)).data)
    for start in range(0, built.blob.size_bytes, CHUNK_BYTES):
        digest.update(data[start : start + CHUNK_BYTES])
        yield data[start : start + CHUNK_BYTES]
    footer: dict[str, Any] = {"key": key, "rows": built.plan.rows, "width": built.plan.width}
    digest.update(_text(footer))
    text = _text(footer | {"sha256": digest.hexdigest()})
    yield memoryview(text + _TAIL.pack(len(text), MARK))


def _text(footer: dict[str, Any]) -> bytes:
    return json.dumps(footer, separators=(",", ":")).encode()


def _read_footer(descriptor: int) -> tuple[int, dict[str, Any]]:
    """Return the bytes of the rows and the footer. Raises ValueError for a file that is no blob."""
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, _TAIL.size, max(0, size - _TAIL.size))
    if len(tail) != _TAIL.size:
        raise ValueError("it is no blob")
    length, mark = _TAIL.unpack(tail)
    rows = size - _TAIL.size - length
    if mark != MARK or rows < 1:
        raise ValueError("it is no blob")
    footer = json.loads(os.pread(descriptor, length, rows))
    if not isinstance(footer, dict):
        raise ValueError("its footer is damaged")
    return rows, footer


def _plan_of(footer: dict[str, Any], layout: Layout) -> PackPlan:
    rows = tuple((int(module), int(layer), int(rank)) for module, layer, rank in footer["rows"])
    return PackPlan(layout, rows, int(footer["width"]))


def _damaged(key: str, why: str) -> Refused:
    return Refused(Reason.ADAPTER_UNAVAILABLE, f"the blob {key} on disk cannot be used: {why}")
