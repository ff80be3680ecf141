"""Checksums that an origin gives for a file, and those computed over the received bytes."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

_HEX_LENGTHS = {"sha256": 64, "md5": 32, "sha1": 40, "crc32": 8}
_PREFERRED = ("sha256", "sha1", "md5", "crc32")


@dataclass(frozen=True)
class Checksum:
    """An algorithm and the expected value of the whole file, in lower-case hex."""

    algorithm: str
    value: str


class Running(Protocol):
    """A checksum of the bytes received so far."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


class _Nothing:
    def update(self, data: bytes, /) -> None:
        """Do nothing: the origin gives no checksum to compare with."""

    def hexdigest(self) -> str:
        return ""


def running(checksum: Checksum | None, size_bytes: int | None) -> Running:
    """Start computing a checksum. Git's (for files that Hugging Face keeps in Git) starts with `size_bytes`."""
    if checksum is None:
        return _Nothing()
    if checksum.algorithm == "crc32":
        return _Crc32()
    if checksum.algorithm == "git":
        return hashlib.sha1(f"blob {size_bytes}\0".encode(), usedforsecurity=False)
    return hashlib.new(checksum.algorithm, usedforsecurity=False)


def from_hex(algorithm: str, text: object) -> Checksum | None:
    """Return the checksum in a hex text, or None if it is not one."""
    value = str(text).strip('"').lower()
    length = _HEX_LENGTHS["sha1" if algorithm == "git" else algorithm]
    return Checksum(algorithm, value) if re.fullmatch(f"[0-9a-f]{{{length}}}", value) else None


def from_base64(algorithm: str, text: object) -> Checksum | None:
    """Return the checksum in a base64 text, or None if it is not one: "…-3" is a checksum of three parts' checksums."""
    try:
        return from_hex(algorithm, base64.b64decode(str(text), validate=True).hex())
    except (binascii.Error, ValueError):
        return None


def best(found: Mapping[str, Checksum | None]) -> Checksum | None:
    """Return the strongest checksum found, or None."""
    return next((found[name] for name in _PREFERRED if found.get(name) is not None), None)


def of_headers(headers: Mapping[str, str]) -> Checksum | None:
    """Return the checksum of the whole file that a web server's headers carry, or None.

    `headers` is any mapping that ignores case. An ETag counts as MD5 only where S3 makes it one: for an object of one
    part that is not encrypted with a key of its own.
    """
    composite = headers.get("x-amz-checksum-type", "").upper() == "COMPOSITE"
    found: dict[str, Checksum | None] = {"md5": _md5_of_headers(headers)}
    if not composite:
        for algorithm in ("sha256", "sha1", "crc32"):
            found[algorithm] = from_base64(algorithm, headers.get(f"x-amz-checksum-{algorithm}", ""))
    found["sha256"] = found.get("sha256") or _sha256_of_headers(headers)
    return best(found)


def _sha256_of_headers(headers: Mapping[str, str]) -> Checksum | None:
    if (linked := headers.get("x-linked-etag")) is not None:  # Hugging Face: the SHA-256 of a large file
        return from_hex("sha256", linked)
    named = re.search(r"sha-256=:?([A-Za-z0-9+/=]+?):?(?:,|$)", headers.get("repr-digest") or headers.get("digest", ""))
    return from_base64("sha256", named[1]) if named else None


def _md5_of_headers(headers: Mapping[str, str]) -> Checksum | None:
    google = re.search(r"md5=([A-Za-z0-9+/=]+)", headers.get("x-goog-hash", ""))
    if google:
        return from_base64("md5", google[1])
    is_s3 = "x-amz-request-id" in headers and "x-amz-server-side-encryption-customer-algorithm" not in headers
    if is_s3 and headers.get("x-amz-server-side-encryption", "AES256") == "AES256":
        return from_hex("md5", headers.get("etag", ""))
    return from_base64("md5", headers.get("content-md5", ""))
