"""API keys from a file: a YAML list that is read again when it changes."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from sidecar.access.entries import Class, Group, Key, Note, Tenant
from sidecar.config.access import Role
from sidecar.config.section import Section, told
from sidecar.config.sources import data_of
from sidecar.errors import Misused, Reason
from sidecar.files import read_regular

logger = logging.getLogger(__name__)

FILE_BYTES_MAX = 1 << 20
"""As much as a Secret of Kubernetes holds, more than 8,000 keys. They are read anew in seconds beside requests."""
SECRET_LENGTH_MIN, SECRET_LENGTH_MAX = 16, 512
ID_PREFIX = "file-"


class FileKey(Section):
    """An entry of the file: `key`, or `sha256` of it in hexadecimal digits."""

    tenant: Tenant
    key: str | None = Field(None, min_length=SECRET_LENGTH_MIN, max_length=SECRET_LENGTH_MAX)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    roles: tuple[Role, ...] = ()
    groups: tuple[Group, ...] = ()
    klass: Class = Field("", alias="class")
    note: Note = ""

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("it needs either key or sha256")
        return self

    @field_validator("key")
    @classmethod
    def _can_be_sent(cls, key: str | None) -> str | None:
        if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
            raise ValueError("it must be ASCII on one line without blanks around it; headers carry no other")
        return key

    @property
    def entry(self) -> Key:
        digest = self.sha256 or sha256((self.key or "").encode()).hexdigest()
        return Key(
            id=ID_PREFIX + digest[:12],
            sha256=digest,
            tenant=self.tenant,
            roles=self.roles,
            groups=self.groups,
            klass=self.klass,
            note=self.note,
            created_by="identity.keys_file",
        )


class KeysFile:
    """The keys of a file. Raises Misused(CONFIG_INVALID) if it cannot be read as one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._mark()
        self.keys = self._read()
        self.trouble = ""
        """Why the file as it is now is not in use; "" if it is."""

    def look(self) -> bool:
        """Read the file again if it has changed; return True if the keys are others now. A bad one changes nothing."""
        mark = self._mark()
        if mark == self._seen:
            return False
        try:
            keys, self.trouble = self._read(), ""
        except Misused as error:
            self.trouble = error.message
            logger.error("%s; the keys that were read before stay in use", error.message)
            keys = self.keys
        self._seen = mark
        changed, self.keys = keys != self.keys, keys
        return changed

    def _mark(self) -> tuple[int, ...]:
        """Return what differs once the file was written or replaced, as by a link of a Kubernetes secret."""
        try:
            found = self._path.stat()
        except OSError:
            return ()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    def _read(self) -> tuple[Key, ...]:
        where = f"identity.keys_file: {self._path}"
        try:
            text = read_regular(self._path, FILE_BYTES_MAX)
        except OSError as error:
            way_out = "; make keys by sidecar keys create instead" if error.errno == errno.EFBIG else ""
            raise Misused(Reason.CONFIG_INVALID, f"{where}: {error.strerror}{way_out}") from error
        listed = data_of(text, where)
        if not isinstance(listed, list):
            raise Misused(Reason.CONFIG_INVALID, f"{where}: it must be a list of keys, as in - tenant: acme")
        keys = tuple(_entry(fields, f"{where}: entry {number}") for number, fields in enumerate(listed, 1))
        if len({key.id for key in keys}) != len(keys):
            raise Misused(Reason.CONFIG_INVALID, f"{where}: two entries have the same key")
        return keys


def _entry(fields: Any, where: str) -> Key:
    try:
        return FileKey.model_validate(fields).entry
    except ValidationError as error:
        raise Misused(Reason.CONFIG_INVALID, f"{where}: {'; '.join(_problems(error))}") from None


def _problems(error: ValidationError) -> Iterator[str]:
    """Yield the problems without the values: a secret may stand where none belongs."""
    for problem in error.errors():
        problem["input"] = []  # of which nothing is shown
        yield told(problem, FileKey)
