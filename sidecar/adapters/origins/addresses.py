"""Which addresses a download may connect to: public ones, unless the allow list names the host.

A registration is a request that makes this process open connections. Without this check it could be made to
ask a cloud's metadata service or a neighbour that trusts this network. A name is resolved once and the
connection goes to the very address that was checked, so a name that resolves differently a moment later
changes nothing.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], list[str]]
"""Called with host and port, returns addresses in the order to try them. Raises OSError."""

_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")
"""IPv4 behind a NAT64 gateway; the last 32 bits are the address that is really reached."""


def resolve(host: str, port: int) -> list[str]:
    """Ask the system for a host's addresses."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(text: str) -> bool:
    """Whether an address is one of the internet at large: not loopback, private, link-local or reserved."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return all(one.is_global and not one.is_multicast for one in (address, *_carried(address)))


def _carried(address: IpAddress) -> list[IpAddress]:
    """Return the IPv4 addresses that an IPv6 one stands for."""
    if not isinstance(address, ipaddress.IPv6Address):
        return []
    carried: list[IpAddress] = [one for one in (address.ipv4_mapped, address.sixtofour) if one is not None]
    if address.teredo is not None:
        carried += address.teredo
    if address in _TRANSLATED:
        carried.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return carried
