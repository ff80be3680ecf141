"""Copy an adapter's files to a folder of ours: their owner may rewrite or remove them at any time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidecar.adapters.folder import Folder, NoAdapter
from sidecar.adapters.names import shown
from sidecar.adapters.origins.failures import no_room, too_large
from sidecar.adapters.origins.files import CONFIG_FILE_NAME, files_among
from sidecar.adapters.origins.limits import Limits
from sidecar.adapters.peft_config import CONFIG_BYTES_MAX
from sidecar.adapters.refusal import unreadable
from sidecar.errors import Invalid


def copy_adapter(name: str, source: Folder, target: Path, limits: Limits) -> Mapping[str, Any]:
    """Copy the files of the adapter in a folder to an empty one, flushed to the disk; return what `config_in` does.

    Only names and sizes are checked. Blocks. Raises Invalid if files are missing, too large, or change meanwhile,
    Refused if there is no room.
    """
    there = source.names(name)
    if CONFIG_FILE_NAME not in there:
        raise NoAdapter(name, f"there is no adapter in {shown(str(source.path), 200)}")
    left_bytes = limits.size_bytes_max
    for file_name in files_among(there):
        left_bytes -= _copy(name, source, file_name, target / file_name, left_bytes)
    with Folder(target, name) as copied:
        return config_in(copied)


def config_in(folder: Folder) -> Mapping[str, Any]:
    """Return the fields of the adapter_config.json in a folder, unchecked; none if it cannot be read. Blocks."""
    try:
        fields = json.loads(folder.read(CONFIG_FILE_NAME, CONFIG_BYTES_MAX, "") or b"")
    except (Invalid, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _copy(name: str, source: Folder, file_name: str, target: Path, bytes_max: int) -> int:
    """Copy a file of a folder and return its size in bytes."""
    descriptor = source.open(file_name, name)
    if descriptor is None:
        raise unreadable(name, f"{file_name}: No such file or directory")
    with os.fdopen(descriptor, "rb") as opened:
        before = os.fstat(descriptor)
        if before.st_size > bytes_max:
            raise too_large(f"{name}: {file_name}", before.st_size, bytes_max)
        try:
            with target.open("xb") as copy:
                shutil.copyfileobj(opened, copy, 1 << 20)
                copy.flush()
                os.fsync(copy.fileno())
        except OSError as error:
            raise no_room(f"{name}: {file_name}", error) from error
        after = os.fstat(descriptor)
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise unreadable(name, f"{file_name} was changed while it was copied; load it again once it is written")
    return before.st_size
