"""Read a PEFT directory: the targets that it adapts, their scales, and its digest.

Reading checks everything except the values themselves (`values.check_values`): files, header, config, names,
pairs, ranks and shapes. Nothing is ever dropped: an adapter with a tensor or a setting that packed rows cannot
carry is refused, with an error that names it and the way out.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sidecar.adapters import peft_config
from sidecar.adapters.base_model import BaseModel, check_dims
from sidecar.adapters.names import shown
from sidecar.adapters.peft_config import parse_config
from sidecar.adapters.refusal import malformed, unreadable, unsupported
from sidecar.adapters.shards import INDEX_BYTES_MAX, Tensors, open_sharded, open_single
from sidecar.adapters.targets import Target as Target
from sidecar.adapters.targets import targets_of
from sidecar.adapters.tensors import open_regular

WEIGHTS_FILE_NAME = "adapter_model.safetensors"
INDEX_FILE_NAME = f"{WEIGHTS_FILE_NAME}.index.json"

_PICKLES = ("adapter_model.bin", "adapter_model.bin.index.json", "adapter_model.pt", "pytorch_model.bin")


@dataclass(frozen=True)
class AdapterSource:
    """A checked PEFT directory. Its files stay open until `close`; use it as a context manager.

    `targets` are in layer-major order, by module id inside a layer. Rows packed in this order fill an
    engine's cache pages best: a layer's rows lie together, and every layer repeats the same sequence of
    sizes.
    """

    name: str
    base_model: str
    targets: tuple[Target, ...]
    digest: str
    file: Tensors

    @property
    def size_bytes(self) -> int:
        return sum(tensor.size_bytes for target in self.targets for tensor in target.tensors)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_adapter(
    path: Path,
    *,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    base_model: str | None = None,
    base: BaseModel | None = None,
) -> AdapterSource:
    """Read and check a PEFT directory: adapter_config.json and safetensors, one file or sharded. Compute its digest.

    Errors call the adapter `name` (default: the folder's name); `progress(done_bytes, total_bytes)` follows the
    hashing. `base_model` replaces the name in the config, which is often a local path or a quantised twin; the digest
    does not depend on it. Every tensor is checked against `base`, if given. Reads every byte once: call it in a thread.
    Raises Invalid for a faulty adapter.
    """
    adapter = name if name is not None else path.name
    directory = _directory(path, adapter)
    config = parse_config(_read_config(directory, adapter), adapter)
    file = _open_weights(directory, adapter)
    try:
        targets = targets_of(file.tensors, config, adapter)
        if base is not None:
            check_dims(base, targets, adapter)
        digest = digest_of(file, config.base_model, config.identity(), progress)
        file.check_unchanged()
    except BaseException:
        file.close()
        raise
    return AdapterSource(adapter, base_model or config.base_model, targets, digest, file)


def _directory(path: Path, adapter: str) -> Path:
    try:
        directory = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise unreadable(adapter, f"the folder {shown(str(path), 200)} cannot be read; check the path") from error
    if not directory.is_dir():
        raise unreadable(adapter, f"{shown(str(path), 200)} is not a folder; give the folder of the adapter")
    return directory


def _read_config(directory: Path, adapter: str) -> bytes:
    path = _file_inside(directory, peft_config.FILE_NAME, adapter)
    if path is None:
        raise malformed(adapter, f"{peft_config.FILE_NAME} is missing; the folder is not a PEFT adapter")
    return _read_bounded(path, peft_config.CONFIG_BYTES_MAX, adapter)


def _read_bounded(path: Path, limit: int, adapter: str) -> bytes:
    try:
        with os.fdopen(open_regular(path, adapter), "rb") as file:
            # read() reserves as many bytes as it is asked for, however small the file is.
            data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        raise unreadable(adapter, f"{path.name} cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise malformed(adapter, f"{path.name} is larger than {limit} bytes")
    return data


def _open_weights(directory: Path, adapter: str) -> Tensors:
    path, index = (_file_inside(directory, name, adapter) for name in (WEIGHTS_FILE_NAME, INDEX_FILE_NAME))
    if path is not None and index is not None:
        raise malformed(adapter, f"it has {WEIGHTS_FILE_NAME} and {INDEX_FILE_NAME}; keep the one that is meant")
    if path is not None:
        return open_single(path, adapter)
    if index is not None:
        data = _read_bounded(index, INDEX_BYTES_MAX, adapter)
        return open_sharded(data, lambda name: _file_inside(directory, name, adapter), adapter, INDEX_FILE_NAME)
    if pickle := next((name for name in _PICKLES if (directory / name).exists()), None):
        raise unsupported(
            adapter,
            f"it has {pickle} only, a pickle, which is never opened because it can run code; "
            "save it with safe_serialization=True",
        )
    raise malformed(adapter, f"{WEIGHTS_FILE_NAME} is missing; the folder is not a complete PEFT adapter")


def _file_inside(directory: Path, file_name: str, adapter: str) -> Path | None:
    """Return the file's resolved path, or None if it does not exist.

    Raises Invalid for a link that leads out of the folder and for anything but a regular file.
    """
    try:
        path = (directory / file_name).resolve(strict=True)
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        raise unreadable(adapter, f"{file_name} cannot be read; check its permissions and links") from error
    if not path.is_relative_to(directory):
        raise unreadable(
            adapter, f"{file_name} is a link that leads out of the folder; copy the file itself there (cp -L)"
        )
    if not stat.S_ISREG(mode):
        raise unreadable(adapter, f"{file_name} is not a regular file; put the file itself there")
    return path


def digest_of(
    file: Tensors,
    base_model: str,
    config_identity: Mapping[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Return the SHA-256 (hex) over base model, config fields, and each tensor's name, dtype, shape and bytes.

    Tensors are hashed in the order of their names, not of the file. Calls `progress(done_bytes, total_bytes)`.
    """
    tensors = [file.tensors[name] for name in sorted(file.tensors)]
    head = {
        "base_model": base_model,
        "config": config_identity,
        "tensors": [[tensor.name, tensor.dtype, tensor.shape] for tensor in tensors],
    }
    # The head gives the size of each tensor, so the bytes that follow cannot be split in two ways.
    digest = hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
    done, total = 0, sum(tensor.size_bytes for tensor in tensors)
    for tensor in tensors:
        for chunk in file.raw_chunks(tensor):
            digest.update(chunk)
        done += tensor.size_bytes
        if progress is not None:
            progress(done, total)
    return digest.hexdigest()
