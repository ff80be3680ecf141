"""Free ports for servers of tests."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from functools import cache
from pathlib import Path

PORTS = range(20_000, 32_000)
"""Ports below those that the kernel gives to clients: a restarted server finds its port free."""
_given: set[int] = set()


def free_port(beside: int = 0) -> int:
    """Return a port on which nothing listens, nor on the one that is `beside` higher; the same one never twice.

    No other process of this user that asks gets it while this one lives, although nothing listens on it yet.
    """
    while True:
        port = random.SystemRandom().choice(PORTS)
        ports = {port, port + beside}
        if ports.isdisjoint(_given) and all(each in PORTS and _claim(each) and _is_free(each) for each in ports):
            _given.update(ports)  # a server may ask for several before it listens at the first
            return port


def _claim(port: int) -> bool:
    # A record lock on one byte: the kernel releases it when the process ends, however it ends.
    try:
        fcntl.lockf(_claims(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    return True


@cache
def _claims() -> int:
    path = Path(tempfile.gettempdir()) / f"sidecar-test-ports-{os.getuid()}"
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _is_free(port: int) -> bool:
    with socket.socket() as free:
        try:
            free.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
