"""Read a pickle of tensors as SGLang takes it, without torch: only the globals of a dict of plain tensors are known."""

from __future__ import annotations

import io
import pickle
import zipfile
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class BadPickle(Exception):
    """A payload that the server's unpickler refuses, or cannot read."""


def read_pickle(text: str) -> dict[str, Array]:
    """Return the tensors in a pickle in base64, bfloat16 as bits in uint16. Raises BadPickle."""
    try:
        found = _Unpickler(io.BytesIO(b64decode(text, validate=True))).load()
    except Exception as error:  # whatever is wrong with it ends the real server
        raise BadPickle(f"{type(error).__name__}: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(each, np.ndarray) for each in found.values()):
        raise BadPickle("no dict of tensors")
    return found


class _Known(pickle.Unpickler):
    known: ClassVar[dict[tuple[str, str], Any]]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"global {module}.{name} is not admitted")
        return self.known[module, name]


class _StorageUnpickler(_Known):
    known: ClassVar = {
        ("torch", "HalfStorage"): np.float16,
        ("torch", "BFloat16Storage"): np.uint16,
        ("torch", "FloatStorage"): np.float32,
    }

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive = archive
        self._root = root

    def persistent_load(self, pid: Any) -> Array:
        kind, dtype, key, device, count = pid
        if kind != "storage" or device != "cpu":
            raise pickle.UnpicklingError(f"{pid} is no storage")
        return np.frombuffer(self._archive.read(f"{self._root}/data/{key}"), dtype, count)


def _storage(data: bytes) -> Array:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        root = archive.namelist()[0].partition("/")[0]
        if archive.read(f"{root}/byteorder") != b"little":
            raise pickle.UnpicklingError("not little-endian")
        storage: Array = _StorageUnpickler(archive, root).load()
    return storage


def _tensor(
    storage: Array, offset: int, shape: Sequence[int], strides: Sequence[int], grad: bool, hooks: object
) -> Array:
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min(shape) < 1 or not 0 <= offset <= last < storage.size:
        raise pickle.UnpicklingError("a tensor that lies outside of its storage")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False).copy()


class _Unpickler(_Known):
    known: ClassVar = {
        ("torch.storage", "_load_from_bytes"): _storage,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("collections", "OrderedDict"): OrderedDict,
    }
