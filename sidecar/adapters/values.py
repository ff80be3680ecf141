"""How large a tensor's values are, and whether all of them are numbers.

The bits of an IEEE float without its sign order like its magnitude, with Inf and NaN on top, so one integer
maximum answers both questions, for bfloat16 as well, without a conversion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from sidecar.adapters.names import shown
from sidecar.adapters.refusal import malformed
from sidecar.adapters.tensors import CHUNK_BYTES, NUMPY_DTYPES, TensorFile, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from sidecar.adapters.peft import AdapterSource

_UNSIGNED: dict[str, type[np.unsignedinteger[Any]]] = {"F16": np.uint16, "BF16": np.uint16, "F32": np.uint32}
_INFINITY = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000}


def check_values(source: AdapterSource, progress: Callable[[int, int], None] | None = None) -> dict[str, float]:
    """Return the largest magnitude of each tensor; raises Invalid with the tensor's name for a NaN or Inf."""
    found: dict[str, float] = {}
    done = 0
    for target in source.targets:
        for tensor in (target.a, target.b):
            found[tensor.name] = largest_magnitude(source.file, tensor)
            done += tensor.size_bytes
        if progress is not None:
            progress(done, source.size_bytes)
    return found


def largest_magnitude(file: TensorFile, tensor: TensorInfo) -> float:
    """Return the largest |x| of a tensor; raises Invalid with the place of the first NaN or Inf."""
    per_chunk = CHUNK_BYTES // NUMPY_DTYPES[tensor.dtype].itemsize
    unsigned = _UNSIGNED[tensor.dtype]
    magnitude = np.array([np.iinfo(unsigned).max >> 1], dtype=unsigned)
    top = 0
    for first in range(0, tensor.elements, per_chunk):
        values = file.elements(tensor, first, min(per_chunk, tensor.elements - first))
        bits = values.view(unsigned) & magnitude
        top = max(top, int(bits.max()))
        if top >= _INFINITY[tensor.dtype]:
            _refuse(file, tensor, first, bits)
    return float(np.array([top], dtype=unsigned).view(NUMPY_DTYPES[tensor.dtype])[0])


def _refuse(file: TensorFile, tensor: TensorInfo, first: int, bits: npt.NDArray[Any]) -> NoReturn:
    infinity = _INFINITY[tensor.dtype]
    index = int(np.argmax(bits >= infinity))
    what = "Inf" if int(bits[index]) == infinity else "NaN"
    place = tuple(int(axis) for axis in np.unravel_index(first + index, tensor.shape))
    raise malformed(
        file.adapter,
        f"tensor {shown(tensor.name, 160)} holds {what} at {list(place)}; its training diverged, export "
        "an earlier checkpoint",
    )
