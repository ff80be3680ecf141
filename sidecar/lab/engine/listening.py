"""The error for an address at which an emulated engine cannot listen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def listening_at(host: str, port: int, option: str) -> Iterator[None]:
    """Raise OSError that names the address and the option for another one, if binding it fails within."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # gRPC raises the latter
        raise OSError(
            f"it cannot listen at {host}:{port}: another process has the port, or the address is not this machine's; "
            f"end that process, or choose another with {option}"
        ) from error
