"""Triton's tensor types: protocol names, element sizes, NumPy forms and typed `contents` fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tritonclient.grpc import model_config_pb2

BYTES_LENGTH_SIZE = 4


@dataclass(frozen=True)
class Datatype:
    """One type. `numpy` is None for BYTES; BF16 is carried as uint16 bit patterns, since NumPy has no bf16."""

    name: str
    config: Any
    numpy: Any
    contents: str | None

    @property
    def size_bytes(self) -> int:
        """Bytes of one element; 0 for BYTES, whose elements carry their own length."""
        return 0 if self.numpy is None else int(np.dtype(self.numpy).itemsize)


_PB = model_config_pb2
_ALL = (
    Datatype("BOOL", _PB.TYPE_BOOL, np.bool_, "bool_contents"),
    Datatype("UINT8", _PB.TYPE_UINT8, np.uint8, "uint_contents"),
    Datatype("UINT16", _PB.TYPE_UINT16, np.uint16, "uint_contents"),
    Datatype("UINT32", _PB.TYPE_UINT32, np.uint32, "uint_contents"),
    Datatype("UINT64", _PB.TYPE_UINT64, np.uint64, "uint64_contents"),
    Datatype("INT8", _PB.TYPE_INT8, np.int8, "int_contents"),
    Datatype("INT16", _PB.TYPE_INT16, np.int16, "int_contents"),
    Datatype("INT32", _PB.TYPE_INT32, np.int32, "int_contents"),
    Datatype("INT64", _PB.TYPE_INT64, np.int64, "int64_contents"),
    Datatype("FP16", _PB.TYPE_FP16, np.float16, None),
    Datatype("BF16", _PB.TYPE_BF16, np.uint16, None),
    Datatype("FP32", _PB.TYPE_FP32, np.float32, "fp32_contents"),
    Datatype("FP64", _PB.TYPE_FP64, np.float64, "fp64_contents"),
    Datatype("BYTES", _PB.TYPE_STRING, None, "bytes_contents"),
)
DATATYPES: dict[str, Datatype] = {datatype.name: datatype for datatype in _ALL}


def split_bytes(data: bytes | memoryview) -> list[bytes]:
    """Return the elements of a serialized BYTES tensor: each has a 4-byte little-endian length before it.

    Raises ValueError if the data ends inside an element.
    """
    view, elements, at = memoryview(data), [], 0
    while at < len(view):
        start = at + BYTES_LENGTH_SIZE
        end = start + int.from_bytes(view[at:start], "little")
        if end > len(view):
            raise ValueError("incomplete string data")
        elements.append(bytes(view[start:end]))
        at = end
    return elements


def join_bytes(elements: list[bytes]) -> bytes:
    """Return the serialized form of a BYTES tensor."""
    return b"".join(len(element).to_bytes(BYTES_LENGTH_SIZE, "little") + element for element in elements)
