"""Free ports for servers of tests."""

from __future__ import annotations

import random
import socket

PORTS = range(20_000, 32_000)
"""Ports below those that the kernel gives to clients: a restarted server finds its port free."""
_given: set[int] = set()


def free_port(beside: int = 0) -> int:
    """Return a port on which nothing listens, nor on the one that is `beside` higher; the same one never twice."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        ports = {port, port + beside}
        if ports.isdisjoint(_given) and all(each in PORTS and _is_free(each) for each in ports):
            _given.update(ports)  # a server may ask for several before it listens at the first
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as free:
        try:
            free.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
