"""Find a tensor's largest magnitude, and refuse NaN and Inf.

Without its sign, the bits of an IEEE float order like its magnitude, with Inf and NaN on top. One integer maximum
therefore does both, for bfloat16 as well, without a conversion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from sidecar.adapters.names import shown
from sidecar.adapters.refusal import malformed
from sidecar.adapters.tensors import CHUNK_BYTES, NUMPY_DTYPES, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from sidecar.adapters.peft import AdapterSource

UNSIGNED: dict[str, type[np.unsignedinteger[Any]]] = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}
INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000}
"""The bits of Inf by safetensors dtype; NaN has larger bits."""

WITHOUT_SIGN = {name: np.array([np.iinfo(unsigned).max >> 1], unsigned) for name, unsigned in UNSIGNED.items()}


class Readable(Protocol):
    """A source of tensors; errors name `adapter`."""

    adapter: str

    def elements(self, tensor: TensorInfo, first: int, count: int) -> npt.NDArray[Any]: ...


def check_values(source: AdapterSource, progress: Callable[[int, int], None] | None = None) -> dict[str, float]:
    """Return the largest magnitude of each tensor, by name. Raises Invalid with the tensor's name for a NaN or Inf."""
    found: dict[str, float] = {}
    done = 0
    for target in source.targets:
        for tensor in target.tensors:
            found[tensor.name] = largest_magnitude(source.file, tensor)
            done += tensor.size_bytes
        if progress is not None:
            progress(done, source.size_bytes)
    return found


def largest_magnitude(file: Readable, tensor: TensorInfo) -> float:
    """Return the largest |x| of a tensor. Raises Invalid with the index of the first NaN or Inf."""
    per_chunk = CHUNK_BYTES // NUMPY_DTYPES[tensor.dtype].itemsize
    unsigned = UNSIGNED[tensor.dtype]
    top = 0
    for first in range(0, tensor.elements, per_chunk):
        values = file.elements(tensor, first, min(per_chunk, tensor.elements - first))
        bits = values.view(unsigned) & WITHOUT_SIGN[tensor.dtype]
        top = max(top, int(bits.max()))
        if top >= INFINITY[tensor.dtype]:
            _refuse(file, tensor, first, bits)
    return float(np.array([top], dtype=unsigned).view(NUMPY_DTYPES[tensor.dtype])[0])


def _refuse(file: Readable, tensor: TensorInfo, first: int, bits: npt.NDArray[Any]) -> NoReturn:
    infinity = INFINITY[tensor.dtype]
    index = int(np.argmax(bits >= infinity))
    what = "Inf" if int(bits[index]) == infinity else "NaN"
    index_in_tensor = tuple(int(axis) for axis in np.unravel_index(first + index, tensor.shape))
    raise malformed(
        file.adapter,
        f"tensor {shown(tensor.name, 160)} holds {what} at {list(index_in_tensor)}; its training diverged, export "
        "an earlier checkpoint",
    )
