"""The names of an adapter's files. No other file is ever requested or accepted."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from sidecar.adapters.names import shown
from sidecar.adapters.peft import INDEX_FILE_NAME, WEIGHTS_FILE_NAME
from sidecar.adapters.peft_config import FILE_NAME as CONFIG_FILE_NAME
from sidecar.adapters.probes import FILE_NAME as PROBE_FILE_NAME
from sidecar.adapters.strict_json import parse_object

_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors\Z")

__all__ = [
    "CONFIG_FILE_NAME",
    "INDEX_FILE_NAME",
    "PROBE_FILE_NAME",
    "WEIGHTS_FILE_NAME",
    "files_among",
    "files_of",
    "is_file_name",
    "is_shard_name",
    "shard_names",
]


def files_of(folder: Path) -> list[Path]:
    """Return the paths of an adapter's files in a folder, required ones also when they are missing."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [folder / name for name in files_among(names)]


def files_among(names: Collection[str]) -> list[str]:
    """Return which files of a folder are an adapter's, required ones also when they are missing.

    They are the config, the weights or their index and shards, and a probe.jsonl if there is one.
    """
    weights = [WEIGHTS_FILE_NAME]
    if WEIGHTS_FILE_NAME not in names:
        weights = [INDEX_FILE_NAME, *filter(is_shard_name, sorted(names))]
    return [CONFIG_FILE_NAME, *weights, *([PROBE_FILE_NAME] if PROBE_FILE_NAME in names else [])]


def is_file_name(name: str) -> bool:
    """Return True if an adapter may have a file of this name."""
    return name in (CONFIG_FILE_NAME, INDEX_FILE_NAME, PROBE_FILE_NAME) or is_shard_name(name)


def is_shard_name(name: str) -> bool:
    """Return True if a file of this name may hold weights: a plain name, no path."""
    return _SHARD.match(name) is not None


def shard_names(index: bytes, shards_max: int) -> list[str]:
    """Return the files that an index names, sorted. Raises ValueError for a malformed index."""
    weight_map = parse_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("it has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    odd = next((name for name in names if not is_shard_name(name)), None)
    if odd is not None:
        raise ValueError(f"it names {shown(odd)}, which is not a plain file name")
    if len(names) > shards_max:
        raise ValueError(f"it names {len(names)} files and {shards_max} are allowed")
    return names
