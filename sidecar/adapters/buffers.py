"""Blobs: packed adapters in mapped memory that is written once, sealed, and leased read-only.

A blob is an anonymous memory file where the system has them. Without them, or when a mount is given (for an
engine that reads shared memory), it is a file that is unlinked with the blob. Another process of the same user can
open `path` while the blob lives: the loader process sends weights this way, without a copy through this process.

All of the memory is reserved at once. A sparse file that meets a full disk later would end the process with
SIGBUS; a reservation that fails is an error with a message.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import tempfile
import threading
import weakref
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from sidecar.adapters.shared_memory import Mount
from sidecar.errors import Reason, Refused

_MACHINE = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")


class NoRoom(Refused):
    """The memory or the mount has no room for a blob."""


class Blob:
    """`size_bytes` of mapped memory: writable until `seal`, read-only afterwards, freed with its last lease.

    The creator holds the first lease. `lease` and `release` may be called from any thread. Arrays keep the
    memory itself alive, so an array that outlives the last lease stays valid; only `path` is gone.
    """

    def __init__(self, size_bytes: int, mount: Mount | None = None) -> None:
        """Reserve the memory. Raises NoRoom (ADAPTER_UNAVAILABLE) when there is no room for it."""
        if size_bytes < 1:
            raise ValueError("a blob has at least one byte")
        self.size_bytes = size_bytes
        self._descriptor, self.path = _reserve(size_bytes, mount)
        self._discard = weakref.finalize(self, _discard, self._descriptor, _to_unlink(self.path))
        self._map = mmap.mmap(self._descriptor, size_bytes)
        self._lock = threading.Lock()
        self._leases = 1
        self._sealed = False

    @property
    def leases(self) -> int:
        return self._leases

    @property
    def is_sealed(self) -> bool:
        return self._sealed

    def array(self, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return the memory as an array, read-only once sealed; raises ValueError if it needs more bytes."""
        assert self._leases > 0, "the blob's last lease was released"
        # Only frombuffer keeps the mapping exported, and so mapped, for as long as the array lives.
        return np.frombuffer(self._map, dtype=dtype, count=prod(shape)).reshape(shape)

    def seal(self) -> None:
        """Make the memory read-only for good. Raises BufferError if a writable array is alive."""
        assert not self._sealed, "a blob is sealed once"
        self._map.close()
        read_only = os.open(_own_path(self._descriptor, self.path), os.O_RDONLY | os.O_CLOEXEC)
        _forbid_writing(self._descriptor)
        # The same number again, so that `path` stays what it was. A descriptor that cannot write is also what
        # lets older kernels map a sealed file.
        os.dup2(read_only, self._descriptor, inheritable=False)
        os.close(read_only)
        self._map = mmap.mmap(self._descriptor, self.size_bytes, access=mmap.ACCESS_READ)
        self._sealed = True

    def lease(self) -> Self:
        """Take one more lease; asserts that one is still held."""
        with self._lock:
            assert self._leases > 0, "the blob's last lease was released"
            self._leases += 1
        return self

    def release(self) -> None:
        """Give one lease back; the last one closes the file and lets the memory go."""
        with self._lock:
            assert self._leases > 0, "released more often than leased"
            self._leases -= 1
            is_last = self._leases == 0
        if is_last:
            self._discard()
            with contextlib.suppress(BufferError):  # a living array owns the mapping now and ends it
                self._map.close()


def _reserve(size_bytes: int, mount: Mount | None) -> tuple[int, Path]:
    try:
        if mount is None:
            _check_memory(size_bytes)
        descriptor, path = _create_anonymous() if mount is None else mount.create()
    except OSError as error:
        raise _no_room(size_bytes, mount, error) from error
    try:
        os.ftruncate(descriptor, size_bytes)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        _discard(descriptor, _to_unlink(path))
        raise _no_room(size_bytes, mount, error) from error
    return descriptor, path


def _no_room(size_bytes: int, mount: Mount | None, error: OSError) -> NoRoom:
    where = "memory" if mount is None else str(mount.directory)
    return NoRoom(
        Reason.ADAPTER_UNAVAILABLE,
        f"no room for {size_bytes} bytes of packed weights in {where} ({error.strerror}); free some, or "
        "lower the store's budget",
    )


def _check_memory(size_bytes: int) -> None:
    available = available_bytes()
    if available is not None and size_bytes > available:
        raise OSError(errno.ENOMEM, f"{available} bytes are available")


def _create_anonymous() -> tuple[int, Path]:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("lora-sidecar", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        return descriptor, Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    descriptor, name = tempfile.mkstemp(prefix=f"lora-sidecar-{os.getpid()}-")
    return descriptor, Path(name)


def _own_path(descriptor: int, path: Path) -> Path:
    return Path(f"/proc/self/fd/{descriptor}") if path.is_relative_to("/proc") else path


def _to_unlink(path: Path) -> Path | None:
    return None if path.is_relative_to("/proc") else path


def _forbid_writing(descriptor: int) -> None:
    # Only memory files can be sealed, and not on every kernel; our own mapping is read-only all the same.
    if hasattr(fcntl, "F_ADD_SEALS"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


def _discard(descriptor: int, unlink: Path | None) -> None:
    os.close(descriptor)
    if unlink is not None:
        unlink.unlink(missing_ok=True)


def available_bytes(machine: Path = _MACHINE, container: Path = _CONTAINER) -> int | None:
    """Return the bytes available now: Linux's estimate within the container's limit (cgroup v2); None if unknown."""
    known = [value for value in (_of_machine(machine), _of_container(container)) if value is not None]
    return min(known, default=None)


def _of_machine(path: Path) -> int | None:
    available_kb = _field(path, "MemAvailable:")
    return None if available_kb is None else available_kb * 1024


def _of_container(folder: Path) -> int | None:
    limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
    if limit is None or used is None:
        return None
    # Cached file pages count as used and are given up when memory is asked for.
    return max(0, limit - used + (_field(folder / "memory.stat", "inactive_file") or 0))


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None  # "max" where there is no limit


def _field(path: Path, name: str) -> int | None:
    rows = (line.split() for line in _text(path).splitlines())
    return next((int(row[1]) for row in rows if row[:1] == [name]), None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
