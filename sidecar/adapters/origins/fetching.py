"""Fetch a whole adapter from an origin into a directory.

Files are requested by the names that an adapter's files have. No listing is needed, so a plain web server suffices.

Folders in object stores and repositories, through fsspec: s3, gs, az and hf.

The libraries find credentials and endpoints by their own chains (environment, profile, instance role); this module
sees neither. Each file is read in ranges, so a download resumes by requesting the next range. The file's metadata is
requested again at the end and must equal that of the beginning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import fsspec

from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.origins.checksums import Checksum, best, from_base64, from_hex
from sidecar.adapters.origins.download import download
from sidecar.adapters.origins.failures import Missing, Stopped, Transient, unreadable
from sidecar.adapters.origins.files import (
    CONFIG_FILE_NAME,
    INDEX_FILE_NAME,
    PROBE_FILE_NAME,
    WEIGHTS_FILE_NAME,
    shard_names,
)
from sidecar.adapters.origins.limits import Errand, Limits, Progress, Surroundings
from sidecar.adapters.origins.origin import Origin
from sidecar.adapters.origins.remote import Body, Remote, Resume
from sidecar.adapters.origins.web import WebFolder
from sidecar.errors import SidecarError, needs_extra

RANGE_BYTES = 4 << 20
_INFO_OPTIONS: Mapping[str, Mapping[str, bool]] = {
    "s3": {"refresh": True},
    "gs": {},
    "az": {"refresh": True},
    "hf": {"refresh": True, "expand_info": True},  # without expand_info: name, size and type only
}
_VALIDATORS = (
    "VersionId",
    "generation",
    "ETag",
    "etag",
    "md5Hash",
    "blob_id",
    "LastModified",
    "last_modified",
    "mtime",
)


class BucketFolder:
    """A folder in a store that fsspec reaches; `filesystem` is the store's client from `client_of`."""

    def __init__(self, origin: Origin, filesystem: Any) -> None:
        self._origin = origin
        self._filesystem = filesystem

    def close(self) -> None:
        """Do nothing: the client closes its connections when it is garbage-collected."""

    @contextmanager
    def open(self, file_name: str, resume: Resume | None, attempt: int) -> Iterator[Body]:
        """Request a file. Raises Missing, Transient or Invalid, also while its chunks are read."""
        file = self._origin.file(file_name)
        path = f"{file.host}/{file.path}"
        with _translated_errors(file):
            info = self._info(path)
            size_bytes, validator = int(info["size"]), _validator(info)
            checksum = _CHECKSUMS[file.scheme](self._filesystem, path, info)
            offset = resume.offset if resume is not None and resume.validator == validator else 0
            yield Body(offset, size_bytes, validator, checksum, self._ranges(path, offset, size_bytes, validator))

    def _ranges(self, path: str, offset: int, size_bytes: int, validator: str) -> Iterator[bytes]:
        while offset < size_bytes:
            chunk = self._filesystem.cat_file(path, start=offset, end=min(offset + RANGE_BYTES, size_bytes))
            if not chunk:
                raise Transient(f"it ended after {offset} of {size_bytes} bytes")
            yield chunk
            offset += len(chunk)
        if _validator(self._info(path)) != validator:
            raise Transient("the file was changed while it was fetched", restart=True)

    def _info(self, path: str) -> Mapping[str, Any]:
        """Return a file's metadata from the store, bypassing the client's cache."""
        self._filesystem.invalidate_cache()
        info: Mapping[str, Any] = self._filesystem.info(path, **_INFO_OPTIONS[self._origin.scheme])
        if info.get("type", "file") != "file":
            raise Missing(path)
        return info


def client_of(origin: Origin) -> Any:
    """Return fsspec's client for a store. Raises Invalid naming the extra to install if it is missing."""
    try:
        return fsspec.filesystem(origin.scheme, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise unreadable(origin, needs_extra(f"{origin.scheme}://", origin.scheme)) from error
    except Exception as error:
        raise unreadable(origin, f"its client does not start: {error or type(error).__name__}") from error


@contextmanager
def _translated_errors(file: Origin) -> Iterator[None]:
    """Turn any exception of a store's library into Missing, Transient or Invalid."""
    try:
        yield
    except (SidecarError, Transient, Missing, Stopped, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise Missing(str(file)) from error
    except PermissionError as error:
        raise unreadable(file, f"access is denied: {error}; give this process credentials that may read it") from error
    except Exception as error:
        if type(error).__name__ in ("NoCredentialsError", "ClientAuthenticationError"):
            raise unreadable(file, f"{error}; give this process credentials as the store's own tools take") from error
        raise Transient(str(error) or type(error).__name__) from error


def _validator(info: Mapping[str, Any]) -> str:
    return "|".join(f"{name}={info[name]}" for name in _VALIDATORS if info.get(name)) + f"|size={info['size']}"


def _of_s3(filesystem: Any, path: str, info: Mapping[str, Any]) -> Checksum | None:
    """S3 keeps the checksums that the writer sent. An ETag is an MD5 for a one-part object without a key of its own."""
    bucket, key, _ = filesystem.split_path(path)
    head = filesystem.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    found: dict[str, Checksum | None] = {}
    if head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
        found = {
            name: from_base64(name, head.get(f"Checksum{name.upper()}", "")) for name in ("sha256", "sha1", "crc32")
        }
    if head.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in head:
        found["md5"] = from_hex("md5", head.get("ETag", ""))
    return best(found)


def _of_google(filesystem: Any, path: str, info: Mapping[str, Any]) -> Checksum | None:
    return from_base64("md5", info.get("md5Hash", ""))


def _of_azure(filesystem: Any, path: str, info: Mapping[str, Any]) -> Checksum | None:
    settings = info.get("content_settings") or {}
    md5 = settings.get("content_md5") if isinstance(settings, Mapping) else getattr(settings, "content_md5", None)
    return from_hex("md5", md5.hex()) if isinstance(md5, (bytes, bytearray)) else None


def _of_hugging_face(filesystem: Any, path: str, info: Mapping[str, Any]) -> Checksum | None:
    """Return the SHA-256 of a large file, or the Git blob id of a file kept in Git."""
    large = info.get("lfs")
    if large:
        return from_hex("sha256", large["sha256"])
    return from_hex("git", info.get("blob_id", ""))


_CHECKSUMS: dict[str, Callable[[Any, str, Mapping[str, Any]], Checksum | None]] = {
    "s3": _of_s3,
    "gs": _of_google,
    "az": _of_azure,
    "hf": _of_hugging_face,
}


logger = logging.getLogger(__name__)

PICKLE_FILE_NAME = "adapter_model.bin"


def open_remote(origin: Origin, allow: AllowList, limits: Limits, surroundings: Surroundings) -> Remote:
    """Return a client for the folder, by the URL's scheme."""
    if origin.is_web:
        return WebFolder(origin, allow, limits, surroundings)
    return BucketFolder(origin, client_of(origin))


def fetch(
    origin: Origin,
    directory: Path,
    limits: Limits,
    progress: Progress,
    *,
    allow: AllowList,
    surroundings: Surroundings | None = None,
) -> int:
    """Fetch adapter_config.json and the weights (one file or shards) into an empty directory; return the bytes fetched.

    A probe.jsonl is fetched too if the origin has one; the adapter is complete without it.

    Runs in a thread. An exception of `progress` ends the fetch. Raises Invalid for a permanent failure, Refused for
    one that may pass; every file in the directory is complete even then.
    """
    allow.check(origin)
    around = surroundings or Surroundings()
    errand = Errand(origin, limits, around, progress)
    with closing(open_remote(origin, allow, limits, around)) as remote:
        try:
            download(remote, CONFIG_FILE_NAME, directory, limits.config_bytes_max, errand)
        except Missing as error:
            raise unreadable(origin, f"it has no {CONFIG_FILE_NAME}; give the folder of a PEFT adapter") from error
        try:
            download(remote, WEIGHTS_FILE_NAME, directory, limits.size_bytes_max, errand)
        except Missing:
            _fetch_shards(remote, directory, errand)
        _fetch_probes(remote, directory, errand)
    return errand.done_bytes


def _fetch_probes(remote: Remote, directory: Path, errand: Errand) -> None:
    try:
        download(remote, PROBE_FILE_NAME, directory, errand.limits.probe_bytes_max, errand)
    except Missing:
        return
    except SidecarError as error:  # some origins answer a missing file with a refusal
        logger.warning("%s: its %s is left out: %s", errand.origin, PROBE_FILE_NAME, error.message)


def _fetch_shards(remote: Remote, directory: Path, errand: Errand) -> None:
    limits = errand.limits
    try:
        download(remote, INDEX_FILE_NAME, directory, limits.index_bytes_max, errand)
    except Missing as error:
        raise unreadable(errand.origin, _no_weights(remote)) from error
    left_bytes = limits.size_bytes_max
    try:
        names = shard_names((directory / INDEX_FILE_NAME).read_bytes(), limits.shards_max)
    except ValueError as error:
        raise unreadable(errand.origin, f"{INDEX_FILE_NAME}: {error}") from error
    for name in names:
        try:
            left_bytes -= download(remote, name, directory, left_bytes, errand)
        except Missing as error:
            raise unreadable(errand.origin, f"{INDEX_FILE_NAME} names {name}, which is not there") from error


def _no_weights(remote: Remote) -> str:
    try:
        with remote.open(PICKLE_FILE_NAME, None, 0):
            return (
                f"it has {PICKLE_FILE_NAME} only, a pickle, which is never opened because it can run code; save the "
                "adapter with safe_serialization=True"
            )
    except Missing:
        return f"it has no {WEIGHTS_FILE_NAME}; the folder is not a complete PEFT adapter"
