"""Copy an adapter's files to a folder of ours: their owner may rewrite or remove them at any time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any

from sidecar.adapters.names import shown
from sidecar.adapters.origins.failures import no_room, too_large
from sidecar.adapters.origins.files import CONFIG_FILE_NAME, files_of
from sidecar.adapters.origins.limits import Limits
from sidecar.adapters.peft_config import CONFIG_BYTES_MAX
from sidecar.adapters.refusal import unreadable
from sidecar.adapters.tensors import open_regular
from sidecar.errors import Invalid, Reason


class NoAdapter(Invalid):
    """The folder does not exist, or holds no adapter."""


def copy_adapter(name: str, source: Path, target: Path, limits: Limits) -> Mapping[str, Any]:
    """Copy the files of the adapter in a folder to an empty one, flushed to the disk; return what `config_in` does.

    Only names and sizes are checked. Blocks. Raises Invalid if files are missing, too large, or change meanwhile,
    Refused if there is no room.
    """
    if not (source / CONFIG_FILE_NAME).is_file():
        raise NoAdapter(Reason.ORIGIN_UNREADABLE, f"{name}: there is no adapter in {shown(str(source), 200)}")
    left_bytes, directory = limits.size_bytes_max, source.resolve()
    for file in files_of(source):
        left_bytes -= _copy(name, file, directory, target / file.name, left_bytes)
    return config_in(target)


def config_in(folder: Path) -> Mapping[str, Any]:
    """Return the fields of the adapter_config.json in a folder, unchecked; none if it cannot be read. Blocks."""
    try:
        with (folder.expanduser() / CONFIG_FILE_NAME).open("rb") as file:
            fields = json.loads(file.read(CONFIG_BYTES_MAX))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no such user, or nested too deeply
        return {}
    return fields if isinstance(fields, dict) else {}


def _copy(name: str, source: Path, directory: Path, target: Path, bytes_max: int) -> int:
    """Copy a file of a directory and return its size in bytes."""
    try:
        real = source.resolve(strict=True)
        if not real.is_relative_to(directory):
            raise unreadable(
                name, f"{source.name} is a link that leads out of the folder; copy the file itself there (cp -L)"
            )
        before = real.stat()
        if not S_ISREG(before.st_mode):
            raise unreadable(name, f"{source.name} is not a file")
        if before.st_size > bytes_max:
            raise too_large(f"{name}: {source.name}", before.st_size, bytes_max)
        opened = os.fdopen(open_regular(real, name), "rb")
    except OSError as error:
        raise unreadable(name, f"{source.name}: {error.strerror or error}") from error
    with opened:
        try:
            with target.open("xb") as copy:
                shutil.copyfileobj(opened, copy, 1 << 20)
                copy.flush()
                os.fsync(copy.fileno())
        except OSError as error:
            raise no_room(f"{name}: {source.name}", target.parent, error) from error
        after = os.fstat(opened.fileno())
    if (after.st_ino, after.st_size, after.st_mtime_ns) != (before.st_ino, before.st_size, before.st_mtime_ns):
        raise unreadable(name, f"{source.name} was changed while it was copied; load it again once it is written")
    return before.st_size
