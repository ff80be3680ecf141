"""A whole adapter: which files of an origin belong to it, and all of them brought into a directory.

Only files that an adapter consists of are asked for, by name; a listing is never needed, so a plain web server
will do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.origins.buckets import BucketFolder, client_of
from sidecar.adapters.origins.download import download
from sidecar.adapters.origins.failures import Missing, unreadable
from sidecar.adapters.origins.limits import Errand, Limits, Progress, Surroundings
from sidecar.adapters.origins.origin import Origin
from sidecar.adapters.origins.remote import Remote
from sidecar.adapters.origins.web import WebFolder
from sidecar.adapters.peft import WEIGHTS_FILE_NAME
from sidecar.adapters.peft_config import FILE_NAME as CONFIG_FILE_NAME
from sidecar.adapters.strict_json import parse_object

INDEX_FILE_NAME = f"{WEIGHTS_FILE_NAME}.index.json"
PICKLE_FILE_NAME = "adapter_model.bin"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors\Z")

Opened = Callable[[Origin, AllowList, Limits, Surroundings], Remote]


def is_shard_name(name: str) -> bool:
    """Whether a file of this name may be a part of sharded weights: a plain name, no path."""
    return _SHARD.match(name) is not None


def open_remote(origin: Origin, allow: AllowList, limits: Limits, surroundings: Surroundings) -> Remote:
    """Return the store that a URL's scheme means."""
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
    """Bring adapter_config.json and the weights, whole or in shards, into an empty directory; return their bytes.

    Runs in a thread. What `progress` raises ends it. Raises Invalid for what will not be right, Refused for what
    may be right later; every file in the directory is whole even then.
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
    return errand.done_bytes


def _fetch_shards(remote: Remote, directory: Path, errand: Errand) -> None:
    limits = errand.limits
    try:
        download(remote, INDEX_FILE_NAME, directory, limits.index_bytes_max, errand)
    except Missing as error:
        raise unreadable(errand.origin, _no_weights(remote)) from error
    left_bytes = limits.size_bytes_max
    for name in shard_names(directory / INDEX_FILE_NAME, errand.origin, limits.shards_max):
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


def shard_names(index: Path, origin: Origin, shards_max: int) -> list[str]:
    """Return the files that an index names, sorted. Raises Invalid for an index that is not one."""
    try:
        weight_map = parse_object(index.read_bytes()).get("weight_map")
    except ValueError as error:
        raise unreadable(origin, f"{INDEX_FILE_NAME} is not valid: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise unreadable(origin, f"{INDEX_FILE_NAME} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    odd = next((name for name in names if not is_shard_name(name)), None)
    if odd is not None:
        raise unreadable(origin, f"{INDEX_FILE_NAME} names {ascii(odd[:80])}, which is not a plain file name")
    if len(names) > shards_max:
        raise unreadable(origin, f"{INDEX_FILE_NAME} names {len(names)} files and {shards_max} are allowed")
    return names
