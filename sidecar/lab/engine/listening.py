"""The sockets of an emulated engine, and the error for an address at which it cannot listen."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from sidecar.errors import Misused, Reason


@contextmanager
def listening_at(host: str, port: int, option: str) -> Iterator[None]:
    """Raise Misused that names the address and the option for another one, if binding it fails within."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # gRPC raises the latter
        raise Misused(
            Reason.PORT_IN_USE,
            f"it cannot listen at {host}:{port}: another process has the port, or the address is not this machine's; "
            f"end that process, or choose another with {option}",
        ) from error


def bound_socket(host: str, port: int, option: str) -> socket.socket:
    """Return a socket that listens on an address once a server takes it. Raises Misused as `listening_at`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # IPPROTO_TCP is named so that asyncio switches Nagle's delay off.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with listening_at(host, port, option):
            listening.bind((host, port))
    except BaseException:
        listening.close()
        raise
    return listening
