"""Free ports for servers of tests."""

from __future__ import annotations

import random
import socket

PORTS = range(20_000, 32_000)
"""Ports below those that the kernel gives to clients: a restarted server finds its port free."""


def free_port() -> int:
    """Return a port on which nothing listens."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
