"""What holds for every test run."""

import os
import sys

# Matrices of tests are tiny: further threads of OpenBLAS only wait for them, busily, at eight times the CPU time. The
# processes that tests start inherit this.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Have loaders, which nearly every sidecar starts, be forked like other processes of tests."""
    if "tests.kit.forked" in sys.modules and "sidecar.backends.triton.loads" in sys.modules:
        from sidecar.backends.triton import loads
        from tests.kit import forked

        forked.begin()
        loads._start = forked.loader  # type: ignore[assignment]
