"""What a backend wants packed rows to look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Layout:
    """The target dtype (`float16` or `bfloat16`), what ranks are padded to, and the tensor-parallel size.

    Separate projections are sent whole whatever `tp` is (the engine cuts them); it is part of the key because
    fused projections are not. Raises ValueError for values that no engine has.
    """

    dtype: str
    rank_multiple: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(_DTYPES)}")
        if self.rank_multiple < 1 or self.tp < 1:
            raise ValueError(f"rank_multiple ({self.rank_multiple}) and tp ({self.tp}) are whole numbers from 1")

    @property
    def label(self) -> str:
        return f"{self.dtype}.r{self.rank_multiple}.tp{self.tp}"

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return _DTYPES[self.dtype]

    def padded(self, rank: int) -> int:
        """Return the rank as it is sent: the next multiple of `rank_multiple`."""
        return -(-rank // self.rank_multiple) * self.rank_multiple
