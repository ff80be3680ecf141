"""Check the addresses that a download may connect to: public ones, unless the allow list names the host.

A registration makes this process open connections. Without this check, a client could use it to reach a cloud's
metadata service or a neighbour that trusts this network. A name is resolved once and the connection goes to the
address that was checked, so a name that resolves differently a moment later changes nothing.

The blocks are IANA's, listed here because `ipaddress.is_global` differs between releases of Python.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

Resolve = Callable[[str, int], list[str]]
"""Takes host and port, returns addresses in the order to try them. Raises OSError."""

_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv4 behind a NAT64 gateway; the last 32 bits are the IPv4 address that the gateway reaches."""
_UNICAST = ipaddress.IPv6Network("2000::/3")
"""The block that IANA assigns for the public internet. Other addresses are loopback, local, reserved or IPv4."""
_NOT_PUBLIC_6 = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # protocol assignments: Teredo, anycast to the nearest gateway, ORCHID, benchmarks
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4: stands for any IPv4 address, and for a network behind it
            "3fff::/20",  # documentation
        ),
    )
)
_NOT_PUBLIC_4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # carriers' NAT; some clouds' metadata
            "127.0.0.0/8",  # loopback
            "169.254.0.0/16",  # link-local; most clouds' metadata
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments, among them anycast to the nearest NAT
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",  # private
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/3",  # multicast, reserved, broadcast
        ),
    )
)


def resolve(host: str, port: int) -> list[str]:
    """Return a host's addresses from the system's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(text: str) -> bool:
    """Return True for an address of the public internet: not loopback, private, link-local or reserved.

    Returns False for text that is no address, for an address with a zone (it belongs to a link), and for IPv6 forms of
    IPv4 addresses other than NAT64's.
    """
    try:
        address = ipaddress.ip_address(text) if "%" not in text else None
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address in _TRANSLATED:
        address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in block for block in _NOT_PUBLIC_4)
    return address is not None and address in _UNICAST and not any(address in block for block in _NOT_PUBLIC_6)
