"""Who needs what in a folder that several sidecars share, so that nobody removes what another one still needs.

Beside `.lora-sidecar/lock`, held for a moment by whoever changes what is claimed, each process is an instance with a
directory of its own there, in which are

    owner         locked for as long as the instance lives, however it ends
    claims/<key>  the instance needs what has this name
    work          what it is making or removing

A thing goes when the last living instance has released it. An instance whose lock is free lives no more: what it has
left goes when the next one starts, and so does everything of ours that nobody claims then.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

from sidecar.adapters.owner import if_dead
from sidecar.errors import Misused, Reason

logger = logging.getLogger(__name__)

HIDDEN = ".lora-sidecar"
DIRECTORY_MODE, LOCK_MODE = 0o775, 0o664
"""Sidecars of one group may share a folder."""
LOCK_WAIT_S = 30.0
LOCK_POLL_S = 0.01
OURS = re.compile(r"[0-9a-f]{64}\.[A-Za-z0-9.+]+\.p\d+\.g\d+\Z")
"""Packed keys. What has another kind of name in the folder is not ours and is never touched."""

Rename = Callable[[Path, Path], object]


class Claims:
    """One process's part in a shared folder. Every method blocks; those that change something raise OSError."""

    def __init__(self, directory: Path, rename: Rename = Path.rename) -> None:
        self.directory = directory
        self._hidden = directory / HIDDEN
        self._rename = rename
        self._own = self._hidden / secrets.token_hex(8)
        self._owner: int | None = None

    @property
    def work(self) -> Path:
        """Where this process makes what it will move into the folder, on the same file system."""
        return self._own / "work"

    def open(self) -> None:
        """Take part, and sweep away what nobody needs any more. Raises Misused with what is wrong with the folder."""
        try:
            for made in (self.directory, self._hidden):
                if not made.is_dir():
                    made.mkdir(exist_ok=True)
                    made.chmod(DIRECTORY_MODE)
            with self.alone():
                self._owner = self._enter()
                swept = list(self._sweep())
        except OSError as error:
            raise Misused(
                Reason.CONFIG_INVALID,
                f"adapters_dir {self.directory} cannot be used: {error.strerror or error}; it must be a folder, on a "
                "file system with locks, that this process can write to",
            ) from error
        for folder in swept:
            self.discard(folder)

    def close(self) -> None:
        """Release everything and leave."""
        if self._owner is None:
            return
        try:
            for claim in list((self._own / "claims").iterdir()):
                self.release(claim.name)
            with self.alone():
                self.discard(self._own)
        except OSError as error:
            logger.warning("%s could not be left tidy: %s", self.directory, error)
        os.close(self._owner)
        self._owner = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep all other threads and processes from changing what is claimed. Raises OSError when that takes long."""
        descriptor = os.open(self._hidden / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, LOCK_MODE)
        try:
            with suppress(PermissionError):  # another user's of our group made it
                os.fchmod(descriptor, LOCK_MODE)
            _lock(descriptor, self._hidden)
            yield
        finally:
            os.close(descriptor)

    def claim(self, key: str) -> None:
        """Keep others from removing what has this name, or will have."""
        with self.alone():
            (self._own / "claims" / key).touch()

    def release(self, key: str) -> None:
        """Give a claim up; what has the name goes unless another living instance claims it."""
        with self.alone():
            (self._own / "claims" / key).unlink(missing_ok=True)
            gone = None if self._is_claimed(key) else self._take_out(key)
        if gone is not None:
            self.discard(gone)

    def discard(self, folder: Path) -> None:
        """Remove a folder of the hidden part; one that resists is left for the next start."""
        try:
            shutil.rmtree(folder)
        except OSError as error:
            logger.warning("%s could not be removed: %s", folder, error.strerror)

    def _enter(self) -> int:
        for part in ("", "claims", "work"):
            (self._own / part).mkdir()
            (self._own / part).chmod(DIRECTORY_MODE)
        descriptor = os.open(self._own / "owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, LOCK_MODE)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    def _sweep(self) -> Iterator[Path]:
        """Take out of the folder what no living instance needs; what is yielded is to be removed."""
        for instance in self._instances():
            if not _lives(instance):
                gone = self._out_of_the_way()
                with suppress(PermissionError):  # another user's: it is that user's to clean up
                    self._rename(instance, gone / instance.name)
                yield gone
        for path in sorted(self.directory.iterdir()):
            if OURS.match(path.name) and not self._is_claimed(path.name):
                unneeded = self._take_out(path.name)
                if unneeded is not None:
                    yield unneeded

    def _instances(self) -> list[Path]:
        return [path for path in sorted(self._hidden.iterdir()) if path.is_dir() and path != self._own]

    def _is_claimed(self, key: str) -> bool:
        return any((instance / "claims" / key).exists() and _lives(instance) for instance in self._instances())

    def _take_out(self, key: str) -> Path | None:
        """Move what has a name into our work folder: quick, unlike removing it. None if there is nothing."""
        gone = self._out_of_the_way()
        try:
            self._rename(self.directory / key, gone / key)
        except FileNotFoundError:
            gone.rmdir()
            return None
        return gone

    def _out_of_the_way(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.work))


def _lock(descriptor: int, where: Path) -> None:
    """Lock a file, but do not wait for ever for a process that is stopped with the lock in its hand."""
    until = monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if monotonic() > until:
                text = f"another process has held {where}/lock for {LOCK_WAIT_S:.0f} s"
                raise OSError(errno.EBUSY, text) from error
            sleep(LOCK_POLL_S)
        else:
            return


def _lives(instance: Path) -> bool:
    """Whether the process of an instance lives: then its lock cannot be had."""
    with if_dead(instance / "owner") as dead:
        return not dead
