"""Fetch a whole adapter from an origin into a directory.

Files are requested by the names that an adapter's files have. No listing is needed, so a plain web server suffices.
"""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.origins.buckets import BucketFolder, client_of
from sidecar.adapters.origins.download import download
from sidecar.adapters.origins.failures import Missing, unreadable
from sidecar.adapters.origins.files import (
    CONFIG_FILE_NAME,
    INDEX_FILE_NAME,
    PROBE_FILE_NAME,
    WEIGHTS_FILE_NAME,
    shard_names,
)
from sidecar.adapters.origins.limits import Errand, Limits, Progress, Surroundings
from sidecar.adapters.origins.origin import Origin
from sidecar.adapters.origins.remote import Remote
from sidecar.adapters.origins.web import WebFolder
from sidecar.errors import SidecarError

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
