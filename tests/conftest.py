"""What holds for every test run."""

import gc
import logging
import os
import ssl
import sys
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import pytest

from sidecar.cli.serving import GRPC_POLLING, GRPC_VARIABLE
from tests.kit.hangs import pytest_timeout_set_timer  # noqa: F401 — a hook

# Matrices of tests are tiny: further threads of OpenBLAS only wait for them, busily, at eight times the CPU time. The
# processes that tests start inherit this.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
assert "grpc" not in sys.modules, "gRPC reads the variable when it is imported"
os.environ.setdefault(GRPC_VARIABLE, GRPC_POLLING)
# A busy machine takes any time for an example.
hypothesis.settings.register_profile("timeless", deadline=None)
hypothesis.settings.load_profile("timeless")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Undo what `configure_logging` changes: a test whose log has more lines than it expects may come next."""
    root, source = logging.getLogger(), logging._srcfile
    level = root.level
    yield
    root.setLevel(level)
    logging._srcfile = source


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the many short files come last, so that all workers end at about the same time."""
    items.sort(key=lambda item: "tests/unit/" in item.nodeid)


def pytest_collection_finish() -> None:
    """Have the processes that a sidecar starts be forked like other processes of tests."""
    if "httpx" in sys.modules:
        _read_certificates_once()
    if "tests.kit.forked" in sys.modules and "sidecar.backends.triton.loads" in sys.modules:
        from sidecar.backends.triton import loads
        from tests.kit import forked

        forked.begin()
        loads._start = forked.loader  # type: ignore[assignment]
        if "sidecar.fronts.openai.large" in sys.modules:
            from sidecar.fronts.openai import large

            large._start = forked.large_reader


def _read_certificates_once() -> None:
    """Have httpx's clients share the context that knows the machine's authorities: it takes 7 ms of CPU to make, and
    most clients of tests ask plain HTTP.
    """
    from httpx._transports import default

    create = default.create_ssl_context
    usual = create()

    def context_of(verify: Any = True, cert: Any = None, trust_env: bool = True) -> ssl.SSLContext:
        is_usual = verify is True and cert is None and not {"SSL_CERT_FILE", "SSL_CERT_DIR"} & os.environ.keys()
        return usual if is_usual else create(verify, cert, trust_env)

    default.create_ssl_context = context_of
