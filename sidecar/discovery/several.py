"""Whether an address that stands for one engine is several by DNS: a headless Service, or another name with many.

Each request and each load would go to one of them by chance, and what is resident where could not be known. Where a
Service has one address for several engines only the cluster can tell: `kubernetes.services`.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic

PATIENCE_S = 3.0
"""How long names are looked up for in all. One that takes longer may be known to another network than this one's."""
Resolve = Callable[[str], Iterable[str]]
"""From a host to its addresses. Raises OSError when it has none."""


def resolve(host: str) -> set[str]:
    """Return the addresses of a host as the system's resolver knows them. Raises OSError."""
    return {str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}


def addresses_of(hosts: Sequence[str], ask: Resolve = resolve, patience_s: float = PATIENCE_S) -> dict[str, set[str]]:
    """Return the addresses of those hosts that can be resolved in time, all asked at once."""
    found: dict[str, set[str]] = {}

    def look(host: str) -> None:
        try:
            found[host] = set(ask(host))
        except OSError:
            return  # it may be a name that only the machine that serves can resolve

    threads = [threading.Thread(target=look, args=(host,), daemon=True) for host in dict.fromkeys(hosts)]
    for thread in threads:
        thread.start()
    until_s = monotonic() + patience_s
    for thread in threads:
        thread.join(max(0.0, until_s - monotonic()))
    return dict(found)


def several(addresses: Iterable[str]) -> list[str]:
    """Return the addresses of a host that is more than one machine, none for one. One of each family is one machine.

    So is all that is this machine itself: localhost may be any of its addresses.
    """
    known = sorted(map(ipaddress.ip_address, addresses), key=str)
    if all(address.is_loopback for address in known):
        return []
    by_family = [[str(each) for each in known if each.version == version] for version in (4, 6)]
    return next((family for family in by_family if len(family) > 1), [])


def problems(places: Mapping[str, str], ask: Resolve = resolve, patience_s: float = PATIENCE_S) -> dict[str, str]:
    """Say what is wrong with places, HOST:PORT by a key of the caller's, that are several engines, and the way out."""
    hosts = {key: place.rpartition(":")[0].strip("[]") for key, place in places.items()}
    known = addresses_of(list(hosts.values()), ask, patience_s)
    wrong = {}
    for key, host in hosts.items():
        found = several(known.get(host, ()))
        if found:
            wrong[key] = problem(f"{host} has {len(found)} addresses", found, f'{{dns: "{places[key]}"}}')
    return wrong


def problem(what: str, engines: Sequence[str], discover: str) -> str:
    """Say what is wrong with one address of these engines, and how they are found instead."""
    shown = ", ".join(engines[:3]) + (", …" if len(engines) > 3 else "")
    return (
        f"{what} ({shown}), so each request and each load would reach another engine; "
        f"write discover: {discover} and kind in place of url"
    )
