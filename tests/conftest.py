"""What holds for every test run."""

import gc
import os
import sys
from collections.abc import Generator

import pytest

# Matrices of tests are tiny: further threads of OpenBLAS only wait for them, busily, at eight times the CPU time. The
# processes that tests start inherit this.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exclude all modules and tests from garbage collection: they stay to the end, and every full collection would look
    through them.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_finish() -> None:
    """Have loaders, which nearly every sidecar starts, be forked like other processes of tests."""
    if "tests.kit.forked" in sys.modules and "sidecar.backends.triton.loads" in sys.modules:
        from sidecar.backends.triton import loads
        from tests.kit import forked

        forked.begin()
        loads._start = forked.loader  # type: ignore[assignment]
