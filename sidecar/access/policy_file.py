"""A file of Cedar policies that is read again when it changes. A faulty one changes nothing."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from sidecar.access.cedar import SCHEMA, CedarPolicy
from sidecar.access.cedar_text import Faulty, statements_of
from sidecar.access.deciding import CachedPolicy
from sidecar.access.policy import Roles
from sidecar.errors import Misused, Reason
from sidecar.files import read_regular

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
FILE_BYTES_MAX = 4 << 20

Stamp = tuple[int, int, int, int] | None
"""What tells that a file was changed, None where there is none."""


class FilePolicy(CachedPolicy):
    """The policies of a file.

    A change counts once two looks in a row find the same: whoever writes the file in place is not interrupted. Raises
    Misused if the file is faulty at first.
    """

    def __init__(self, path: Path, roles: Roles, separator: str) -> None:
        self._path = path
        self._roles = roles
        self._separator = separator
        self._seen = self._tried = _stamp(path)
        try:
            self._text, policy = self._read()
        except Faulty as error:
            raise Misused(Reason.CONFIG_INVALID, f"access.policies.cedar: {path}: {error}") from error
        super().__init__(policy, str(path))

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            await self.look()

    async def look(self) -> None:
        """Look at the file once, and take its policies if they have changed and can be read."""
        stamp = await asyncio.to_thread(_stamp, self._path)
        is_settled, self._seen = stamp == self._seen, stamp
        if not is_settled or stamp == self._tried:
            return
        self._tried = stamp
        try:
            text, policy = await asyncio.to_thread(self._read)
        except Faulty as error:
            self.fault = str(error)
            logger.error(
                "%s: %s; the policies that were read before still decide, correct the file", self._path, self.fault
            )
            return
        self.fault = ""
        if text != self._text:
            self._text = text
            self.replace(policy)
        logger.info("%s was read again; policies of epoch %d decide", self._path, self.epoch)

    def _read(self) -> tuple[str, CedarPolicy]:
        """Return the file's text and its policies. Raises Faulty."""
        try:
            text = read_regular(self._path, FILE_BYTES_MAX).decode("utf-8-sig")
        except OSError as error:
            raise Faulty(f"it cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise Faulty(f"it is no UTF-8 text: byte {error.start} is not") from error
        return text, CedarPolicy(statements_of(text, SCHEMA), self._roles, self._separator)


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode
