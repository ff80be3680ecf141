"""What a download asks of a store: open a file, at its beginning or where an earlier attempt got to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from sidecar.adapters.origins.checksums import Checksum


@dataclass(frozen=True)
class Resume:
    """Where to go on, and what says that it is still the same file."""

    offset: int
    validator: str


@dataclass(frozen=True)
class Body:
    """A file that is being read from `offset` on.

    `size_bytes` is that of the whole file, None where the end is marked in the stream; an empty `validator` means
    that a later attempt must begin again.
    """

    offset: int
    size_bytes: int | None
    validator: str
    checksum: Checksum | None
    chunks: Iterator[bytes]


class Remote(Protocol):
    """One folder of one store. Failures are Missing, Transient (try again) or a SidecarError (for good)."""

    def open(self, file_name: str, resume: Resume | None, attempt: int) -> AbstractContextManager[Body]: ...

    def close(self) -> None: ...
