"""The NumPy dtypes of packed rows."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from sidecar.core.facts import Layout as Layout

_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def numpy_dtype(layout: Layout) -> np.dtype[Any]:
    """Return the dtype of the packed rows; NumPy itself has no bf16."""
    return _DTYPES[layout.dtype]
