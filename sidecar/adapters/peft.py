"""Read a PEFT directory: the targets that it adapts, their scales, and its digest.

Reading checks everything except the values themselves (`values.check_values`): files, header, config, names,
pairs, ranks and shapes. Nothing is ever dropped: an adapter with a tensor or a setting that packed rows cannot
carry is refused, with an error that names it and the way out.

The tensors of an adapter, in one safetensors file or in several that an index names.

The index (`adapter_model.safetensors.index.json`, as transformers writes it for large models) maps each tensor to its
file. The files must agree with it: each holds exactly the tensors that the index assigns to it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from sidecar.adapters import peft_config
from sidecar.adapters.base_model import BaseModel, check_dims
from sidecar.adapters.folder import Folder, opened
from sidecar.adapters.names import shown
from sidecar.adapters.peft_config import PeftConfig, parse_config
from sidecar.adapters.refusal import malformed, unsupported
from sidecar.adapters.strict_json import parse_object
from sidecar.adapters.targets import Target as Target
from sidecar.adapters.targets import targets_of
from sidecar.adapters.tensors import TENSORS_MAX, TensorFile, TensorInfo

INDEX_BYTES_MAX = 4 << 20
SHARDS_MAX = 64

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors\Z")


class Tensors:
    """The open files of an adapter as one. They close with `close` or with the object; errors name `adapter`."""

    def __init__(self, files: Sequence[TensorFile], adapter: str) -> None:
        self.adapter = adapter
        self.files = tuple(files)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {
                name: replace(tensor, shard=shard) if shard else tensor
                for shard, file in enumerate(files)
                for name, tensor in file.tensors.items()
            }
        )

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def elements(self, tensor: TensorInfo, first: int, count: int) -> npt.NDArray[Any]:
        return self.files[tensor.shard].elements(tensor, first, count)

    def read_into(self, tensor: TensorInfo, first: int, out: npt.NDArray[Any]) -> None:
        self.files[tensor.shard].read_into(tensor, first, out)

    def raw_chunks(self, tensor: TensorInfo, first_byte: int = 0) -> Iterator[bytes]:
        return self.files[tensor.shard].raw_chunks(tensor, first_byte)

    def check_unchanged(self) -> None:
        for file in self.files:
            file.check_unchanged()

    def close(self) -> None:
        for file in self.files:
            file.close()


def open_single(name: str, descriptor: int, adapter: str) -> Tensors:
    """Return an adapter of one file, which is open. Raises Invalid for a false header."""
    return Tensors([TensorFile(name, descriptor, adapter)], adapter)


def open_sharded(index: bytes, find: Callable[[str], int | None], adapter: str, index_name: str) -> Tensors:
    """Return the files that an index names; `find` opens a file. Raises Invalid if index and files disagree."""
    try:
        owners = _owners(parse_object(index))
    except ValueError as error:
        raise malformed(adapter, f"{index_name}: {error}; save the adapter again") from error
    with ExitStack() as stack:
        files = [
            stack.enter_context(closing(_opened(name, find, owners, adapter)))
            for name in sorted(frozenset(owners.values()))
        ]
        stack.pop_all()  # all files are open: the caller closes them
    return Tensors(files, adapter)


def _owners(index: Mapping[str, Any]) -> dict[str, str]:
    owners = index.get("weight_map")
    if not isinstance(owners, dict) or not 0 < len(owners) <= TENSORS_MAX:
        raise ValueError(f"its weight_map is not an object of 1 to {TENSORS_MAX} tensors")
    for tensor, file_name in owners.items():
        if not isinstance(file_name, str) or not _SHARD_NAME.match(file_name):
            raise ValueError(f"tensor {shown(tensor, 160)} is in {shown(str(file_name)[:200])}, no plain file name")
    if len(frozenset(owners.values())) > SHARDS_MAX:
        raise ValueError(f"it names more than {SHARDS_MAX} files")
    return owners


def _opened(name: str, find: Callable[[str], int | None], owners: Mapping[str, str], adapter: str) -> TensorFile:
    descriptor = find(name)
    if descriptor is None:
        raise malformed(adapter, f"{shown(name, 200)} is missing, which its index names; fetch the adapter again")
    file = TensorFile(name, descriptor, adapter)
    expected = [tensor for tensor, owner in owners.items() if owner == name]
    missing = next((tensor for tensor in expected if tensor not in file.tensors), None)
    extra = next((tensor for tensor in file.tensors if owners.get(tensor) != name), None)
    if missing is not None or extra is not None:
        file.close()
        what = f"lacks tensor {shown(missing or '', 160)}" if extra is None else f"holds tensor {shown(extra, 160)} too"
        raise malformed(adapter, f"{shown(name, 200)} {what}, against its index; fetch the adapter again")
    return file


WEIGHTS_FILE_NAME = "adapter_model.safetensors"
INDEX_FILE_NAME = f"{WEIGHTS_FILE_NAME}.index.json"

_PICKLES = ("adapter_model.bin", "adapter_model.bin.index.json", "adapter_model.pt", "pytorch_model.bin")


@dataclass(frozen=True)
class AdapterSource:
    """A checked PEFT directory. Its files stay open until `close`; use it as a context manager.

    `targets` are in layer-major order, by module id inside a layer. Rows packed in this order fill an
    engine's cache pages best: a layer's rows lie together, and every layer repeats the same sequence of
    sizes. `documents` are the bytes of its other files: the config, and the index if there is one.
    """

    name: str
    base_model: str
    targets: tuple[Target, ...]
    file: Tensors
    documents: Mapping[str, bytes]
    claims: PeftConfig
    """Its config. `base_model` may be another name."""
    digest: str = ""
    """Empty until it is computed."""

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
    source: Path | Folder,
    *,
    name: str | None = None,
    base_model: str | None = None,
    base: BaseModel | None = None,
) -> AdapterSource:
    """Open and check a PEFT directory as `open_adapter` does, and compute its digest.

    Reads every byte once: call it in a thread. Raises Invalid for a faulty adapter.
    """
    found = open_adapter(source, name=name, base_model=base_model, base=base)
    try:
        return replace(found, digest=Hashing(found).digest())
    except BaseException:
        found.close()
        raise


def open_adapter(
    source: Path | Folder,
    *,
    name: str | None = None,
    base_model: str | None = None,
    base: BaseModel | None = None,
) -> AdapterSource:
    """Open and check a PEFT directory: adapter_config.json and safetensors, one file or sharded.

    Errors call the adapter `name` (default: the folder's name). `base_model` replaces the name in the config, which is
    often a local path or a quantised twin; the digest does not depend on it. Every tensor is checked against `base`, if
    given. Raises Invalid for a faulty adapter.
    """
    adapter = name if name is not None else (source.path if isinstance(source, Folder) else source).name
    with opened(source, adapter) as folder:
        documents = {peft_config.FILE_NAME: _read_config(folder, adapter)}
        config = parse_config(documents[peft_config.FILE_NAME], adapter)
        file = _open_weights(folder, adapter, documents)
    try:
        targets = targets_of(file.tensors, config, adapter)
        if base is not None:
            check_dims(base, targets, adapter)
    except BaseException:
        file.close()
        raise
    return AdapterSource(adapter, base_model or config.base_model, targets, file, documents, config)


def _read_config(folder: Folder, adapter: str) -> bytes:
    data = folder.read(peft_config.FILE_NAME, peft_config.CONFIG_BYTES_MAX, adapter)
    if data is None:
        raise malformed(adapter, f"{peft_config.FILE_NAME} is missing; the folder is not a PEFT adapter")
    return data


def _open_weights(folder: Folder, adapter: str, documents: dict[str, bytes]) -> Tensors:
    """Open the file with the weights, or those that an index names, which becomes one of the documents."""
    index = folder.read(INDEX_FILE_NAME, INDEX_BYTES_MAX, adapter)
    descriptor = folder.open(WEIGHTS_FILE_NAME, adapter)
    if descriptor is not None:
        single = open_single(WEIGHTS_FILE_NAME, descriptor, adapter)
        if index is None:
            return single
        single.close()
        raise malformed(adapter, f"it has {WEIGHTS_FILE_NAME} and {INDEX_FILE_NAME}; keep the one that is meant")
    if index is not None:
        documents[INDEX_FILE_NAME] = index
        return open_sharded(index, lambda name: folder.open(name, adapter), adapter, INDEX_FILE_NAME)
    there = folder.names(adapter)
    if pickle := next((name for name in _PICKLES if name in there), None):
        raise unsupported(
            adapter,
            f"it has {pickle} only, a pickle, which is never opened because it can run code; "
            "save it with safe_serialization=True",
        )
    raise malformed(adapter, f"{WEIGHTS_FILE_NAME} is missing; the folder is not a complete PEFT adapter")


class Hashing:
    """The tensors of an adapter, hashed while they are read by whoever packs them.

    The digest is the SHA-256 over base model, config fields, and each tensor's name, dtype, shape and bytes, in the
    order of the tensors' names. What is read in that order is hashed from the reader's own buffer; `digest` reads the
    rest.
    """

    def __init__(self, source: AdapterSource) -> None:
        self.adapter, self._file = source.file.adapter, source.file
        tensors = [source.file.tensors[name] for name in sorted(source.file.tensors)]
        head = {
            "base_model": source.claims.base_model,
            "config": source.claims.identity(),
            "tensors": [[tensor.name, tensor.dtype, tensor.shape] for tensor in tensors],
        }
        # The head gives the size of each tensor, so the bytes that follow cannot be split in two ways.
        self._sha256 = hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode())
        self._left = deque(tensor for tensor in tensors if tensor.size_bytes)
        self._at = 0
        """The bytes hashed of the first that is left."""

    def elements(self, tensor: TensorInfo, first: int, count: int) -> npt.NDArray[Any]:
        return self._file.elements(tensor, first, count)

    def read_into(self, tensor: TensorInfo, first: int, out: npt.NDArray[Any]) -> None:
        self._file.read_into(tensor, first, out)
        if self._left and tensor is self._left[0] and first * out.itemsize == self._at:
            self._sha256.update(out.view(np.uint8).data)
            self._at += out.nbytes
            if self._at == tensor.size_bytes:
                self._left.popleft()
                self._at = 0

    def digest(self) -> str:
        """Return the digest (hex). Raises Invalid if a file was changed since it was opened."""
        while self._left:
            for chunk in self._file.raw_chunks(self._left.popleft(), self._at):
                self._sha256.update(chunk)
            self._at = 0
        self._file.check_unchanged()
        return self._sha256.hexdigest()
