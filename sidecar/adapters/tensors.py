"""Read untrusted safetensors files: every claim of the header is checked before a tensor is read.

The file is 8 bytes of header length (little-endian), a JSON header, and the tensors' bytes. The checks cover the
header's length against the file's, duplicate keys, each tensor's dtype x shape against its byte range, and that the
ranges cover the data exactly once, without holes.

Bytes are read with `pread`, never through a mapping of the file: truncating a mapped file kills the process with
SIGBUS, while a short read is an error that names the adapter. Both are served by the page cache.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from sidecar.adapters.names import shown
from sidecar.adapters.refusal import malformed
from sidecar.adapters.strict_json import parse_object

HEADER_BYTES_MAX = 4 << 20
"""Parsing holds the interpreter lock. A LoRA of 126 layers and 7 modules has a header of about 0.4 MB."""

TENSORS_MAX = 16_384
CHUNK_BYTES = 512 << 10
"""The size of one read, and so of one NumPy call: a thread beside an event loop works in small pieces."""

NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}
)
"""The dtypes a LoRA tensor may have."""

_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_DIMENSIONS_MAX = 8
_SIZE_LIMIT = 1 << 48


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its safetensors dtype, shape, and byte range (`offset` counts from the file's start)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    shard: int = 0
    """The index of the adapter's file that holds the tensor."""

    @property
    def elements(self) -> int:
        return prod(self.shape)


class TensorFile:
    """An open safetensors file whose header was checked; errors name it and `adapter`.

    Raises Invalid(ADAPTER_MALFORMED) for a false header. The file closes with `close` or with the object.
    """

    def __init__(self, name: str, descriptor: int, adapter: str) -> None:
        self.name = name
        self.adapter = adapter
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._identity = self._stamp()
        try:
            self.tensors: Mapping[str, TensorInfo] = MappingProxyType(self._read_header())
        except BaseException:
            self.close()
            raise

    @property
    def size_bytes(self) -> int:
        return self._identity[1]

    def close(self) -> None:
        self._close()

    def array(self, tensor: TensorInfo) -> npt.NDArray[Any]:
        """Return a whole tensor, read-only, in its shape; its dtype must be one of `NUMPY_DTYPES`."""
        return self.elements(tensor, 0, tensor.elements).reshape(tensor.shape)

    def elements(self, tensor: TensorInfo, first: int, count: int) -> npt.NDArray[Any]:
        """Return `count` elements from the row-major position `first`, read-only and flat."""
        dtype = NUMPY_DTYPES[tensor.dtype]
        data = self._read(tensor.offset + first * dtype.itemsize, count * dtype.itemsize)
        return np.frombuffer(data, dtype=dtype)

    def read_into(self, tensor: TensorInfo, first: int, out: npt.NDArray[Any]) -> None:
        """Fill a contiguous array of the tensor's dtype with its elements from the row-major position `first`."""
        offset, view = tensor.offset + first * out.itemsize, out.view(np.uint8).data
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise self._malformed(f"it ends before byte {offset + len(view)}, so it was cut short; fetch it again")
            offset, view = offset + count, view[count:]

    def raw_chunks(self, tensor: TensorInfo, first_byte: int = 0) -> Iterator[bytes]:
        """Yield a tensor's bytes from one on, in pieces of at most `CHUNK_BYTES`."""
        return self._pieces(tensor.offset + first_byte, tensor.size_bytes - first_byte)

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes of the whole file, as it was when it was opened, in such pieces."""
        return self._pieces(0, self.size_bytes)

    def _pieces(self, offset: int, size_bytes: int) -> Iterator[bytes]:
        for start in range(0, size_bytes, CHUNK_BYTES):
            yield self._read(offset + start, min(CHUNK_BYTES, size_bytes - start))

    def check_unchanged(self) -> None:
        """Raise Invalid if the file was written to since it was opened: the bytes read may mix two versions."""
        if self._stamp() != self._identity:
            raise malformed(self.adapter, f"{self.name} was changed while it was read; register it again")

    def _stamp(self) -> tuple[int, int, int]:
        status = os.fstat(self._descriptor)
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _read(self, offset: int, count: int) -> bytes:
        data = os.pread(self._descriptor, count, offset)
        if len(data) == count:
            return data
        pieces = [data]
        while data and (missing := count - sum(map(len, pieces))):
            data = os.pread(self._descriptor, missing, offset + count - missing)
            pieces.append(data)
        if sum(map(len, pieces)) < count:
            raise self._malformed(f"it ends before byte {offset + count}, so it was cut short; fetch it again")
        return b"".join(pieces)

    def _read_header(self) -> dict[str, TensorInfo]:
        if self.size_bytes < 8:
            raise self._malformed(f"it has {self.size_bytes} bytes, too few for a header; fetch it again")
        length = int.from_bytes(self._read(0, 8), "little")
        if length > HEADER_BYTES_MAX:
            raise self._malformed(f"its header claims {length} bytes, more than the {HEADER_BYTES_MAX} allowed")
        if 8 + length > self.size_bytes:
            raise self._malformed(
                f"its header claims {length} bytes but the file has {self.size_bytes}, so it was cut short; "
                "fetch it again"
            )
        try:
            return _tensors_of(parse_object(self._read(8, length)), 8 + length, self.size_bytes)
        except ValueError as error:
            raise self._malformed(f"its header is not valid: {error}; save the adapter again") from error

    def _malformed(self, why: str) -> Exception:
        return malformed(self.adapter, f"{self.name}: {why}")


def _tensors_of(header: dict[str, Any], data_start: int, file_size: int) -> dict[str, TensorInfo]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of strings")
    if len(header) > TENSORS_MAX:
        raise ValueError(f"it lists {len(header)} tensors, more than the {TENSORS_MAX} allowed")
    tensors = {name: _tensor(name, entry, data_start) for name, entry in header.items()}
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.size_bytes)):
        if tensor.offset != end:
            what = "overlaps the one before it" if tensor.offset < end else "leaves a hole before it"
            raise ValueError(f"tensor {shown(tensor.name)} {what}")
        end += tensor.size_bytes
        if end > file_size:
            raise ValueError(f"tensor {shown(tensor.name)} ends at byte {end}, but the file has {file_size}")
    if end != file_size:
        raise ValueError(f"{file_size - end} bytes after the last tensor belong to none")
    return tensors


def _tensor(name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
        raise ValueError(f"tensor {shown(name)} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"tensor {shown(name)} has the unknown dtype {shown(str(dtype)[:200])}")
    if not _are_sizes(shape) or len(shape) > _DIMENSIONS_MAX:
        raise ValueError(f"tensor {shown(name)} has a shape that is not a short list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {shown(name)} has data_offsets that are not a range")
    size_bytes, needed = offsets[1] - offsets[0], prod(shape) * _ITEM_BYTES[dtype]
    if size_bytes != needed:
        raise ValueError(f"tensor {shown(name)} of {dtype} {shape} needs {needed} bytes but has {size_bytes}")
    return TensorInfo(name, dtype, tuple(shape), data_start + offsets[0], size_bytes)


def _are_sizes(value: Any) -> bool:
    # `type(...) is int` and not isinstance: JSON's true would pass for 1.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _SIZE_LIMIT for item in value)
