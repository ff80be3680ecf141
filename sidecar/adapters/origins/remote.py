"""The interface between a download and a store: open a file at its beginning, or where an earlier attempt ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from sidecar.adapters.origins.checksums import Checksum


@dataclass(frozen=True)
class Resume:
    """The offset to resume at, and the validator that shows that the file is unchanged."""

    offset: int
    validator: str


@dataclass(frozen=True)
class Body:
    """A file that is being read from `offset` on.

    `size_bytes` is the size of the whole file, or None where the stream marks its end. An empty `validator` means
    that a later attempt must start over.
    """

    offset: int
    size_bytes: int | None
    validator: str
    checksum: Checksum | None
    chunks: Iterator[bytes]


class Remote(Protocol):
    """One folder of one store. Methods raise Missing, Transient (retry) or a SidecarError (permanent)."""

    def open(self, file_name: str, resume: Resume | None, attempt: int) -> AbstractContextManager[Body]: ...

    def close(self) -> None: ...
