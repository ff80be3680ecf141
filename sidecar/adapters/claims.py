"""Claims on the entries of a folder that several sidecars share, so that none removes an entry another still needs.

A process that changes claims holds `.lora-sidecar/lock` for that moment. Each process is an instance with its own
directory beside that lock:

    owner         a file locked while the instance lives; the kernel unlocks it however the process ends
    claims/<key>  the instance needs the entry of this name
    work          entries that the instance is making or removing

An entry is removed when the last living instance releases it. An instance whose `owner` lock is free is dead. What it
leaves stays until another instance's `sweep` removes its directory, and every entry of ours that no instance claims:
an engine may be reading those for answers that outlive the dead one.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

from sidecar.adapters.entries import Entries, Files
from sidecar.adapters.owner import if_dead
from sidecar.errors import Misused, Reason

logger = logging.getLogger(__name__)

HIDDEN = ".lora-sidecar"
DIRECTORY_MODE, LOCK_MODE = 0o775, 0o664
"""Sidecars of one group may share a folder."""
LOCK_WAIT_S = 30.0
LOCK_POLL_S = 0.01
OURS = re.compile(r"[0-9a-f]{64}\.[A-Za-z0-9.+]+\.p\d+\.g\d+\Z")
"""Matches packed keys. Entries with other names are not ours and are never touched."""


def make_folder(path: Path) -> bool:
    """Make a folder for all to read, if it is not there; return True if it was not. Raises OSError."""
    if path.is_dir():
        return False
    path.mkdir(exist_ok=True)
    path.chmod(DIRECTORY_MODE)
    return True


class Claims:
    """One process's claims in a shared folder. Every method blocks; those that change something raise OSError."""

    def __init__(self, directory: Path, files: Files | None = None) -> None:
        self._hidden = directory / HIDDEN
        self._own = self._hidden / secrets.token_hex(8)
        self.entries = Entries(directory, self._own / "work", files)
        self._owner: int | None = None
        self._left: frozenset[str] = frozenset()
        """Entries that no living instance claimed at the start; they stay until `sweep`."""

    def open(self) -> None:
        """Join the folder. Raises Misused if the folder cannot be used."""
        folder = self.entries.directory
        try:
            make_folder(folder)
            make_folder(self._hidden)
            with self.alone():
                self._owner = self._enter()
                self._left = frozenset(path.name for path in self._unclaimed())
        except OSError as error:
            raise Misused(
                Reason.CONFIG_INVALID,
                f"adapters_dir {folder} cannot be used: {error.strerror or error}; it must be a folder, on a file "
                "system with locks, that this process can write to",
            ) from error

    def sweep(self) -> None:
        """Remove what dead instances have left, and entries that nobody needs."""
        with self.alone():
            self._left = frozenset()
            swept = list(self._sweep())
        for folder in swept:
            self.entries.discard(folder)

    def close(self, as_dead: bool = False) -> None:
        """Release every claim and leave the folder; `as_dead` leaves all of it to a later `sweep`, as a kill does."""
        if self._owner is None:
            return
        if as_dead:
            os.close(self._owner)
            self._owner = None
            return
        try:
            for claim in list((self._own / "claims").iterdir()):
                self.release(claim.name)
            with self.alone():
                self.entries.discard(self._own)
        except OSError as error:
            logger.warning("%s could not be left tidy: %s", self.entries.directory, error)
        os.close(self._owner)
        self._owner = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep all other threads and processes from changing claims. Raises OSError if the lock stays taken."""
        descriptor = os.open(self._hidden / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, LOCK_MODE)
        try:
            with suppress(PermissionError):  # another user's of our group made it
                os.fchmod(descriptor, LOCK_MODE)
            _lock(descriptor, self._hidden)
            yield
        finally:
            os.close(descriptor)

    def claim(self, key: str) -> None:
        """Keep others from removing the entry of this name, which may not exist yet."""
        with self.alone():
            (self._own / "claims" / key).touch()

    def release(self, key: str) -> None:
        """Give up a claim, and remove the entry unless another living instance claims it."""
        with self.alone():
            (self._own / "claims" / key).unlink(missing_ok=True)
            gone = None if key in self._left or self._is_claimed(key) else self.entries.take_out(key)
        if gone is not None:
            self.entries.discard(gone)

    def _enter(self) -> int:
        for part in ("", "claims", "work"):
            (self._own / part).mkdir()
            (self._own / part).chmod(DIRECTORY_MODE)
        descriptor = os.open(self._own / "owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, LOCK_MODE)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    def _sweep(self) -> Iterator[Path]:
        """Move out of the folder what no living instance needs, and yield each moved folder for removal."""
        for instance in self._instances():
            if not _lives(instance):
                gone = self.entries.make()
                with suppress(PermissionError):  # another user's: it is that user's to clean up
                    self.entries.files.rename(instance, gone / instance.name)
                yield gone
        for path in self._unclaimed():
            unneeded = self.entries.take_out(path.name)
            if unneeded is not None:
                yield unneeded

    def _unclaimed(self) -> list[Path]:
        ours = [path for path in sorted(self.entries.directory.iterdir()) if OURS.match(path.name)]
        own = self._own / "claims"
        return [path for path in ours if not ((own / path.name).exists() or self._is_claimed(path.name))]

    def _instances(self) -> list[Path]:
        return [path for path in sorted(self._hidden.iterdir()) if path.is_dir() and path != self._own]

    def _is_claimed(self, key: str) -> bool:
        return any((instance / "claims" / key).exists() and _lives(instance) for instance in self._instances())


def _lock(descriptor: int, where: Path) -> None:
    """Lock a file; give up after `LOCK_WAIT_S`, since a stopped process may hold the lock for ever."""
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
    """Return True if the process of an instance lives: it then holds the instance's lock."""
    with if_dead(instance / "owner") as dead:
        return not dead
