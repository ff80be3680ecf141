"""Let torch without CUDA make what SGLang wants pinned: pinned memory is for copies to a GPU."""

from typing import Any

import torch

_MAKERS = (
    "empty", "zeros", "ones", "tensor", "full", "empty_like", "zeros_like", "arange", "randint", "rand", "randn",
)  # fmt: skip


def _unpinned(original: Any) -> Any:
    def made(*given: Any, **named: Any) -> Any:
        named.pop("pin_memory", None)
        return original(*given, **named)

    return made


for _name in _MAKERS:
    setattr(torch, _name, _unpinned(getattr(torch, _name)))
torch.Tensor.pin_memory = lambda self, *_, **__: self
