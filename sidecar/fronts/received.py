"""Read from the kernel how many bytes each of this process's TCP connections has received.

gRPC hands over whole messages only, and nothing in Python says how much of one has come. The kernel counts (`TCP_INFO`,
Linux since 4.1), and gRPC's sockets are among the descriptors of this process. They are read in place and never
duplicated: a duplicate would keep a connection in gRPC's epoll set after gRPC has closed it.
"""

from __future__ import annotations

import socket
import struct
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

DESCRIPTORS = Path("/proc/self/fd")
BYTES_RECEIVED_AT = 128
"""Offset of `tcpi_bytes_received`, 64 bits, in the kernel's `struct tcp_info`."""
TCP_INFO_BYTES = 256


class Wire(NamedTuple):
    """One TCP connection: the peer's host and port, and the local port that it came to."""

    host: str
    port: int
    to: int


@lru_cache(8192)
def wire_of(peer: str, to: int) -> Wire | None:
    """Return the connection of a peer as gRPC names it, such as ipv4:10.0.0.1:5555; None if it is not TCP."""
    family, _, place = unquote(peer).partition(":")
    if family not in ("ipv4", "ipv6"):
        return None
    host, _, port = place.rpartition(":")
    return Wire(_plain(host.strip("[]").partition("%")[0]), int(port), to)


class Received:
    """Look up connections. `find` lists the descriptors; each is checked again whenever it is used."""

    def __init__(self) -> None:
        self._descriptors: dict[Wire, int] = {}

    def find(self) -> None:
        """List the process's connections anew. Takes some microseconds a descriptor."""
        self._descriptors = {}
        try:
            descriptors = [int(entry.name) for entry in DESCRIPTORS.iterdir()]
        except OSError:
            return  # not Linux: nothing is known
        for descriptor in descriptors:
            found = _look(descriptor)
            if found is not None:
                self._descriptors[found[0]] = descriptor

    def bytes_of(self, wire: Wire) -> int | None:
        """Return the bytes that a connection has received since it began; None if it is unknown or closed."""
        descriptor = self._descriptors.get(wire)
        if descriptor is None:
            return None
        found = _look(descriptor)
        if found is None or found[0] != wire:  # closed, and the descriptor may already be another's
            del self._descriptors[wire]
            return None
        return found[1]


def _look(descriptor: int) -> tuple[Wire, int] | None:
    """Return the connection of a descriptor and its bytes; None if it is no TCP connection or is closed."""
    try:
        looked_at = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, 0, fileno=descriptor)
    except OSError:
        return None
    try:
        peer, here = looked_at.getpeername(), looked_at.getsockname()
        info = looked_at.getsockopt(socket.IPPROTO_TCP, getattr(socket, "TCP_INFO", 11), TCP_INFO_BYTES)
    except OSError:
        return None
    finally:
        looked_at.detach()
    if not isinstance(peer, tuple) or len(info) < BYTES_RECEIVED_AT + 8:
        return None
    return Wire(_plain(peer[0]), peer[1], here[1]), int(struct.unpack_from("=Q", info, BYTES_RECEIVED_AT)[0])


def _plain(host: str) -> str:
    """Return an IPv4-mapped IPv6 address as IPv4, any other address unchanged."""
    return host.removeprefix("::ffff:") if "." in host else host
