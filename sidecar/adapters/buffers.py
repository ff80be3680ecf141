"""Blobs: packed adapters in mapped memory that is written once, sealed, and leased read-only.

A blob lies in a region: an anonymous memory file where the system has them. Without them, or when a mount is given (for
an engine that reads shared memory), it is a file that is unlinked with the region. Another process of the same user can
open `path` while the blob lives: the loader process sends weights this way, without a copy through this process.

All of the memory is reserved at once. A sparse file that meets a full disk later would end the process with
SIGBUS; a reservation that fails is an error with a message.

Fresh memory costs more than packing into it: the kernel clears each page, maps it on the first write and takes it back
at the end. So the regions of a few ended blobs are kept for the next ones.
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
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from sidecar.adapters.shared_memory import Mount
from sidecar.errors import Reason, Refused

_MACHINE = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")
F_SEAL_FUTURE_WRITE = 0x10
"""Linux 5.1: forbids all writing but through mappings that are there already. Python has no name for it."""
SEALS = F_SEAL_FUTURE_WRITE | getattr(fcntl, "F_SEAL_SHRINK", 0) | getattr(fcntl, "F_SEAL_GROW", 0)


class NoRoom(Refused):
    """The memory or the mount has no room for a blob."""


class Region:
    """Mapped memory and the file behind it. It is freed by `close`, or once nothing refers to it."""

    def __init__(self, size_bytes: int, mount: Mount | None) -> None:
        """Reserve the memory. Raises NoRoom (ADAPTER_UNAVAILABLE) when there is no room for it."""
        self._mount = mount
        self._descriptor, self.path = _reserve(size_bytes, mount)
        self._discard = weakref.finalize(self, _discard, self._descriptor, _to_unlink(self.path))
        self.map = mmap.mmap(self._descriptor, size_bytes)

    @property
    def size_bytes(self) -> int:
        return len(self.map)

    def is_read(self) -> bool:
        """Return True if an array of the memory is alive."""
        try:
            self.map.resize(self.size_bytes)
        except BufferError:
            return True
        except (OSError, SystemError, ValueError):  # where mappings cannot be resized
            return False
        return False

    def forbid_writing(self) -> None:
        """Let no other process write to a memory file. This one keeps a mapping that it writes to again once ended."""
        # Only memory files can be sealed, and not on every kernel.
        if hasattr(fcntl, "F_ADD_SEALS"):
            with contextlib.suppress(OSError):
                fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, SEALS)

    def may_hold(self, size_bytes: int) -> bool:
        """Return True if the region can be made to hold so many bytes: a sealed memory file keeps its size."""
        return size_bytes == self.size_bytes or self._mount is not None

    def use_again(self, size_bytes: int) -> None:
        """Prepare for another blob. Raises OSError if there is no room, BufferError if an array is alive."""
        grows = size_bytes > self.size_bytes
        self.map.resize(size_bytes)
        if grows:
            os.posix_fallocate(self._descriptor, 0, size_bytes)
        if self._mount is not None:  # an old name must not lead to new content
            self.path = self._mount.renamed(self.path)
            self._discard.detach()
            self._discard = weakref.finalize(self, _discard, self._descriptor, self.path)

    def close(self) -> None:
        self._discard()
        with contextlib.suppress(BufferError):  # a living array owns the mapping now and ends it
            self.map.close()


class Regions:
    """Memory for blobs, in `mount` or private. Up to `spares_max` regions of ended blobs are kept for the next ones.

    `allowance` returns how many bytes they may take in all beside a new blob. Every method may be called from any
    thread.
    """

    def __init__(
        self, mount: Mount | None = None, spares_max: int = 0, allowance: Callable[[], int] = lambda: 1 << 62
    ) -> None:
        self.mount = mount
        self._spares_max, self._allowance = spares_max, allowance
        self._spares: list[Region] = []
        self._lock = threading.Lock()

    def take(self, size_bytes: int) -> Region:
        """Return a region for a new blob, its content undefined. Raises NoRoom."""
        spare, excess = self._picked(size_bytes)
        for region in excess:
            region.close()
        if spare is not None:
            try:
                spare.use_again(size_bytes)
            except (BufferError, OSError, SystemError):
                spare.close()
            else:
                return spare
        try:
            return Region(size_bytes, self.mount)
        except NoRoom:
            if not self.close():
                raise
            return Region(size_bytes, self.mount)

    def _picked(self, size_bytes: int) -> tuple[Region | None, list[Region]]:
        """Take out the spare that is closest in size, and the oldest of the others beyond the allowance."""
        with self._lock:
            able = [region for region in self._spares if region.may_hold(size_bytes)]
            spare = min(able, key=lambda region: abs(region.size_bytes - size_bytes), default=None)
            if spare is not None:
                self._spares.remove(spare)
            excess, allowance = [], self._allowance()
            kept_bytes = sum(region.size_bytes for region in self._spares)
            while self._spares and kept_bytes > allowance:
                excess.append(self._spares.pop(0))
                kept_bytes -= excess[-1].size_bytes
            return spare, excess

    def give_back(self, region: Region, is_reusable: bool) -> None:
        """Keep the region of an ended blob, or free it.

        Its bytes count as free only afterwards, so it is `take` that compares the spares with the allowance.
        """
        with self._lock:
            if is_reusable:
                self._spares.append(region)
            excess = self._spares[: max(0, len(self._spares) - self._spares_max)]
            del self._spares[: len(excess)]
        for each in excess if is_reusable else (*excess, region):
            each.close()

    def close(self) -> bool:
        """Free the spares; return False if there were none."""
        with self._lock:
            spares, self._spares = self._spares, []
        for region in spares:
            region.close()
        return bool(spares)


PRIVATE = Regions()
"""Private memory of which nothing is kept."""


class Blob:
    """`size_bytes` of mapped memory: writable until `seal`, read-only afterwards, freed with its last lease.

    The creator holds the first lease. `lease` and `release` may be called from any thread. Arrays keep the
    memory itself alive, so an array that outlives the last lease stays valid; only `path` is gone.
    """

    def __init__(self, size_bytes: int, regions: Regions = PRIVATE) -> None:
        """Reserve the memory. Raises NoRoom (ADAPTER_UNAVAILABLE) when there is no room for it."""
        if size_bytes < 1:
            raise ValueError("a blob has at least one byte")
        self.size_bytes = size_bytes
        self._regions = regions
        self._region = regions.take(size_bytes)
        self.path = self._region.path
        self._lock = threading.Lock()
        self._leases = 1
        self._sealed = False
        self.is_reusable = True
        """Its memory may be used again; not while something outside this process may still read it."""

    @property
    def leases(self) -> int:
        return self._leases

    @property
    def is_sealed(self) -> bool:
        return self._sealed

    def array(self, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return the memory as an array, read-only once sealed; raises ValueError if it needs more bytes."""
        assert self._leases > 0, "the blob's last lease was released"
        memory = memoryview(self._region.map)
        # Only frombuffer keeps the mapping exported, and so mapped, for as long as the array lives.
        return np.frombuffer(memory.toreadonly() if self._sealed else memory, dtype=dtype, count=prod(shape)).reshape(
            shape
        )

    def seal(self) -> None:
        """Make the memory read-only. Raises BufferError if a writable array is alive."""
        assert not self._sealed, "a blob is sealed once"
        if self._region.is_read():
            raise BufferError("an array that can be written to is alive")
        self._region.forbid_writing()
        self._sealed = True

    def lease(self) -> Self:
        """Take one more lease; asserts that one is still held."""
        with self._lock:
            assert self._leases > 0, "the blob's last lease was released"
            self._leases += 1
        return self

    def release(self) -> None:
        """Give one lease back; the last one gives the memory back."""
        with self._lock:
            assert self._leases > 0, "released more often than leased"
            self._leases -= 1
            is_last = self._leases == 0
        if is_last:
            self._regions.give_back(self._region, self.is_reusable)


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


def _to_unlink(path: Path) -> Path | None:
    return None if path.is_relative_to("/proc") else path


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
