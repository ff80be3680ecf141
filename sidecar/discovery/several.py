"""Detect a backend's host that DNS resolves to several engines: a headless Service, or another name with addresses.

Each request and each load would go to a random one of them, so the sidecar could not know which adapters are resident.
A Service with one cluster IP for several engines is detected by `kubernetes.services`.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import monotonic

PATIENCE_S = 3.0
"""The timeout of all lookups together. A name that takes longer may belong to a network that this host cannot reach."""
Resolve = Callable[[str], Iterable[str]]
"""Takes a host, returns its addresses. Raises OSError if it has none."""


def resolve(host: str) -> set[str]:
    """Return the addresses of a host from the system's resolver. Raises OSError."""
    return {str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}


def addresses_of(hosts: Sequence[str], ask: Resolve = resolve, patience_s: float = PATIENCE_S) -> dict[str, set[str]]:
    """Return the addresses of the hosts that resolve in time; all lookups run concurrently."""
    found: dict[str, set[str]] = {}

    def look(host: str) -> None:
        try:
            found[host] = set(ask(host))
        except OSError:
            return  # only the serving machine may be able to resolve it

    threads = [threading.Thread(target=look, args=(host,), daemon=True) for host in dict.fromkeys(hosts)]
    for thread in threads:
        thread.start()
    until_s = monotonic() + patience_s
    for thread in threads:
        thread.join(max(0.0, until_s - monotonic()))
    return dict(found)


def several(addresses: Iterable[str]) -> list[str]:
    """Return the addresses of a host that is several machines, or [] for one machine.

    One address of each family counts as one machine, and so do loopback addresses.
    """
    known = sorted(map(ipaddress.ip_address, addresses), key=str)
    if all(address.is_loopback for address in known):
        return []
    by_family = [[str(each) for each in known if each.version == version] for version in (4, 6)]
    return next((family for family in by_family if len(family) > 1), [])


def problems(places: Mapping[str, str], ask: Resolve = resolve, patience_s: float = PATIENCE_S) -> dict[str, str]:
    """Return, by the caller's keys, the problem and the way out for each HOST:PORT that is several engines."""
    hosts = {key: place.rpartition(":")[0].strip("[]") for key, place in places.items()}
    known = addresses_of(list(hosts.values()), ask, patience_s)
    wrong = {}
    for key, host in hosts.items():
        found = several(known.get(host, ()))
        if found:
            wrong[key] = problem(f"{host} has {len(found)} addresses", found, f'{{dns: "{places[key]}"}}')
    return wrong


def problem(what: str, engines: Sequence[str], discover: str) -> str:
    """Return the problem of one address for several engines, and the configuration that finds them."""
    shown = ", ".join(engines[:3]) + (", …" if len(engines) > 3 else "")
    return (
        f"{what} ({shown}), so each request and each load would reach another engine; "
        f"write discover: {discover} and kind in place of url"
    )
