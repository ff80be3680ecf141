"""A stub of SGLang's kernels, which are built for GPUs alone: every name is there, and none can be called."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> Any:
        raise RuntimeError(f"sgl_kernel.{name} is not built for a CPU")

    return missing
