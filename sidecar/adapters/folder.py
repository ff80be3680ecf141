"""An adapter's folder, opened once: what is read of it is read by its descriptor, wherever its path leads by then.

Who writes to a folder can exchange it, or a folder above it, for a link at any moment. A path that was checked leads to
another tenant's files then; a descriptor does not.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from errno import EINVAL, ELOOP
from pathlib import Path
from types import TracebackType
from typing import Self

from sidecar.adapters.names import shown
from sidecar.adapters.refusal import malformed, unreadable
from sidecar.errors import Invalid, Reason

_FOLDER = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", 0)


class NoAdapter(Invalid):
    """The folder does not exist, or holds no adapter."""

    def __init__(self, adapter: str, message: str) -> None:
        super().__init__(Reason.ORIGIN_UNREADABLE, f"adapter {shown(adapter)}: {message}", adapter=adapter)


class Folder:
    """An open folder; `path` is where it was found.

    It closes with `close` or with the object. What a thread reads is left to the latter: it may outlast who began it.
    """

    def __init__(self, path: Path, adapter: str, beneath: Path | None = None) -> None:
        """Open a folder. Below `beneath`, which it is in, no part of its path may be a link. Raises NoAdapter."""
        self.path = path
        try:
            if beneath is None:
                self._descriptor = os.open(path, _FOLDER)
            else:
                with Folder(beneath, adapter) as root:
                    self._descriptor = root._descend(path.relative_to(beneath).parts, _FOLDER)
        except NotADirectoryError as error:
            raise NoAdapter(
                adapter, f"{shown(str(path), 200)} is not a folder; give the folder of the adapter"
            ) from error
        except (OSError, ValueError) as error:
            why = "no such folder" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", "no path")
            raise NoAdapter(
                adapter, f"the folder {shown(str(path), 200)} cannot be read ({why}); check the path"
            ) from error
        self._close = weakref.finalize(self, os.close, self._descriptor)

    def close(self) -> None:
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def names(self, adapter: str) -> list[str]:
        """Return the names of all that is in the folder. Raises Invalid if it may not be listed."""
        try:
            descriptor = self._descend((), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                with os.scandir(descriptor) as entries:
                    return sorted(entry.name for entry in entries)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise unreadable(adapter, f"its folder cannot be listed: {error.strerror}") from error

    def open(self, name: str, adapter: str) -> int | None:
        """Open a file and return its descriptor; None if there is none. Links inside the folder are followed.

        Raises Invalid for a link that leads out of the folder, whatever is there, and for anything but a regular file.
        """
        try:
            descriptor = self._open(name, adapter)
        except FileNotFoundError:
            return None
        except OSError as error:
            why = f"{name} cannot be opened ({error.strerror}); check its permissions and links"
            if error.errno == EINVAL:  # what was a link is none any more
                why = f"{name} changed while it was read; try again"
            raise unreadable(adapter, why) from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise unreadable(adapter, f"{name} is not a regular file; put the file itself there")
        return descriptor

    def _open(self, name: str, adapter: str) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO in the file's place would hang the open
        try:
            return self._descend((name,), flags)
        except OSError as error:
            if error.errno != ELOOP:
                raise
        inside = Path(os.path.realpath(self.path / name))
        if not inside.is_relative_to(home := os.path.realpath(self.path)):
            raise unreadable(
                adapter, f"{name} is a link that leads out of the folder; copy the file itself there (cp -L)"
            )
        return self._descend(inside.relative_to(home).parts, flags)

    def read(self, name: str, bytes_max: int, adapter: str) -> bytes | None:
        """Return a file's bytes; None if there is none. Raises Invalid, also for more than `bytes_max`."""
        descriptor = self.open(name, adapter)
        if descriptor is None:
            return None
        try:
            with os.fdopen(descriptor, "rb") as file:
                # read() reserves as many bytes as it is asked for, however small the file is.
                data = file.read(min(bytes_max, os.fstat(descriptor).st_size) + 1)
        except OSError as error:
            raise unreadable(adapter, f"{name} cannot be read: {error.strerror}") from error
        if len(data) > bytes_max:
            raise malformed(adapter, f"{name} is larger than {bytes_max} bytes")
        return data

    def _descend(self, parts: Sequence[str], flags: int) -> int:
        """Open what is below the folder. Raises OSError if a part on the way, or the last one, is a link."""
        *above, last = parts or (".",)
        held = os.dup(self._descriptor)
        try:
            for part in above:
                below = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=held)
                os.close(held)
                held = below
            return os.open(last, flags | os.O_NOFOLLOW, dir_fd=held)
        finally:
            os.close(held)


def opened(source: Path | Folder, adapter: str) -> AbstractContextManager[Folder]:
    """Open a folder by its path for a block, or use one that is open."""
    return nullcontext(source) if isinstance(source, Folder) else Folder(source, adapter)
