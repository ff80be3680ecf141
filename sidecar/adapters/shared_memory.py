"""Blobs that an engine on the same machine can read: files in a shared-memory mount, named by their owner.

Every process that keeps blobs in a mount is an instance with an id. Its files are `lora-sidecar-<id>-…`, and it holds
a lock on `lora-sidecar-<id>.owner` while it lives. The kernel frees the lock however the process ends. A file whose
owner's lock is free is therefore a leftover, which the next instance to start removes; no instance touches the files of
another living one.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sidecar.adapters.owner import if_dead

logger = logging.getLogger(__name__)

PREFIX = "lora-sidecar-"
DIRECTORY = Path("/dev/shm")
MODE = 0o660
"""The engine opens regions for writing, and in a pod it may run as another user of the same group."""

_OWNED = re.compile(rf"{PREFIX}([0-9a-f]{{16}})[-.].+")


class Mount:
    """One process's part of a shared-memory mount."""

    def __init__(self, directory: Path = DIRECTORY) -> None:
        """Claim an id. Raises OSError when the mount cannot be written to."""
        self.directory = directory
        self.instance, self._lock = _claim(directory)

    @property
    def prefix(self) -> str:
        """The prefix of the names of this process's files."""
        return f"{PREFIX}{self.instance}-"

    @property
    def free_bytes(self) -> int:
        """The free bytes of the mount."""
        usage = os.statvfs(self.directory)
        return usage.f_bavail * usage.f_frsize

    def create(self) -> tuple[int, Path]:
        """Create an empty file of this instance; return its descriptor and path. Raises OSError."""
        descriptor, name = tempfile.mkstemp(prefix=self.prefix, dir=self.directory)
        os.fchmod(descriptor, MODE)
        return descriptor, Path(name)

    def renamed(self, path: Path) -> Path:
        """Give a file of this instance another name; return it. Raises OSError."""
        new = self.directory / f"{self.prefix}{secrets.token_hex(8)}"
        path.rename(new)
        return new

    def is_leftover(self, name: str) -> bool:
        """Return True if the name is that of a dead instance's file."""
        owned = _OWNED.fullmatch(name)
        if owned is None or owned[1] == self.instance:
            return False
        with if_dead(_owner_file(self.directory, owned[1])) as dead:
            return dead

    def sweep(self) -> int:
        """Remove the files of dead instances; return the bytes freed."""
        freed = 0
        instances = {owned[1] for path in self.directory.iterdir() if (owned := _OWNED.fullmatch(path.name))}
        for instance in instances - {self.instance}:
            owner = _owner_file(self.directory, instance)
            with if_dead(owner) as dead:
                if dead:
                    freed += _remove(self.directory, instance)
                    owner.unlink(missing_ok=True)  # last, so that the next sweep finishes one that was cut short
        return freed

    def close(self) -> None:
        """Remove the files that are left of this instance, and its owner file."""
        _remove(self.directory, self.instance)
        _owner_file(self.directory, self.instance).unlink(missing_ok=True)
        os.close(self._lock)


def _owner_file(directory: Path, instance: str) -> Path:
    return directory / f"{PREFIX}{instance}.owner"


def _claim(directory: Path) -> tuple[str, int]:
    while True:
        instance = secrets.token_hex(8)
        path = _owner_file(directory, instance)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return instance, descriptor
        os.close(descriptor)  # a sweep ran between open and lock and removed the file as a leftover


def _remove(directory: Path, instance: str) -> int:
    removed = 0
    for path in directory.glob(f"{PREFIX}{instance}-*"):
        with contextlib.suppress(OSError):
            removed += path.stat().st_size
            path.unlink()
    return removed


@dataclass(frozen=True)
class SharedMemory:
    """Where the store's blobs lie: in `mount`; if that is None, in private memory, for the reason `why_not`."""

    mount: Mount | None = None
    why_not: str = "the store is not in shared memory"


NOT_SHARED = SharedMemory()


def claim_shared_memory(size_bytes: int, directory: Path = DIRECTORY) -> SharedMemory:
    """Open a shared-memory mount and remove what dead processes left, if it then has room for `size_bytes`."""
    try:
        mount = Mount(directory)
        freed = mount.sweep()
        free = mount.free_bytes
    except OSError as error:
        return SharedMemory(why_not=f"{directory} cannot be used: {error.strerror or error}")
    if freed:
        logger.info("%s: removed %s bytes that dead processes had left", directory, freed)
    if free >= size_bytes:
        return SharedMemory(mount)
    mount.close()
    return SharedMemory(
        why_not=f"{directory} has {free} bytes free and store.memory_bytes is {size_bytes}; give it more (docker "
        "--shm-size, Kubernetes: sizeLimit of an emptyDir of medium Memory) or lower store.memory_bytes"
    )
