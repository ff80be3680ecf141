"""The tensors of an adapter, in one safetensors file or in several that an index names.

The index (`adapter_model.safetensors.index.json`, as transformers writes it for large models) maps each tensor to its
file. The files must agree with it: each holds exactly the tensors that the index assigns to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy.typing as npt

from sidecar.adapters.names import shown
from sidecar.adapters.refusal import malformed
from sidecar.adapters.strict_json import parse_object
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

    def raw_chunks(self, tensor: TensorInfo) -> Iterator[bytes]:
        return self.files[tensor.shard].raw_chunks(tensor)

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
