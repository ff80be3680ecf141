"""BF16 tensors of Triton's Python backend, which NumPy has no type for, as their bits.

The backend gives such a tensor only as a DLPack capsule. The capsule's name is asked of itself instead of assumed:
consumers that expect one spelling fail on it now and then.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CPU = 1
_BFLOAT, _BITS, _LANES = 4, 16, 1


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("number", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h, with which a DLManagedTensor begins."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("dimensions", ctypes.c_int32),
        ("datatype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_name_of = ctypes.pythonapi.PyCapsule_GetName
_name_of.restype, _name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def bits_of(tensor: Any) -> NDArray[np.uint16]:
    """Return a BF16 tensor's bits: a view of the request's memory, valid as long as the request lives.

    Raises ValueError for a tensor of another type, on another device, or not in row-major order.
    """
    capsule = tensor.__dlpack__()
    # The raw name, byte for byte: GetPointer compares it with the capsule's own.
    pointer = _pointer_of(capsule, _name_of(capsule))
    described = _Tensor.from_address(pointer)
    datatype = described.datatype
    if (datatype.code, datatype.bits, datatype.lanes) != (_BFLOAT, _BITS, _LANES) or described.device.kind != _CPU:
        raise ValueError(f"{tensor.name()} is no BF16 tensor in CPU memory")
    shape = tuple(described.shape[: described.dimensions])
    if described.strides and tuple(described.strides[: described.dimensions]) != _row_major(shape):
        raise ValueError(f"{tensor.name()} is not in row-major order")
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return np.zeros(shape, np.uint16)
    words = (ctypes.c_uint16 * count).from_address(described.data + described.byte_offset)
    bits: NDArray[np.uint16] = np.frombuffer(memoryview(words), np.uint16).reshape(shape)
    return bits


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))
