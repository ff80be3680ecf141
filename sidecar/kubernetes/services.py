"""Whether a backend's address stands for several engines: a Service with more than one endpoint.

Each request, and each load, would go to one of them by chance, and what is resident where could not be known.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Sequence

from sidecar.kubernetes.api import Api, Object
from sidecar.kubernetes.endpoint_slices import found_in, slices_of
from sidecar.kubernetes.failures import ApiError

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SERVICE = re.compile(rf"({_LABEL})(?:\.({_LABEL})(?:\.svc(?:\.[a-z0-9.-]+)?)?)?\.?\Z")

Resolve = Callable[[str], Iterable[str]]
"""From a host to its IP addresses. Raises OSError when it has none."""


def resolve(host: str) -> set[str]:
    """Return the addresses of a host, as this machine's resolver knows them. Raises OSError."""
    return {str(found[4][0]) for found in socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)}


def service_of(host: str, namespace: str) -> tuple[str, str] | None:
    """Return the Service and the namespace that a host could be in a cluster: `triton`, `triton.ml`, `triton.ml.svc`…

    `namespace` is the asker's own. None for addresses and other names.
    """
    found = _SERVICE.match(host.lower())
    if found is None or _is_address(host):
        return None
    return found[1], found[3] or namespace


def problem_by_dns(host: str, port: int, resolve: Resolve = resolve) -> str | None:
    """Say what is wrong with a backend at a host that has several addresses, and what to write instead.

    That is a headless Service with several endpoints. None for every other host, and for one that is not known here:
    the engines' network may not be this machine's. A machine that has an address of each family is one.
    """
    if _is_address(host) or host == "localhost":
        return None
    try:
        addresses = [ipaddress.ip_address(address) for address in resolve(host)]
    except OSError:
        return None
    by_family = [sorted(str(each) for each in addresses if each.version == version) for version in (4, 6)]
    several = next((family for family in by_family if len(family) > 1), [])
    return _problem(host, several, f'discover: {{dns: "{host}:{port}"}}')


async def problem_by_api(api: Api, host: str, port: int) -> str | None:
    """Say the same of a Service that has several endpoints behind one address of its own, which DNS does not show.

    `port` is the Service's. None for every other host, and when the cluster does not say.
    """
    service = service_of(host, api.access.namespace)
    if service is None:
        return None
    name, namespace = service
    try:
        about = await api.get(f"/api/v1/namespaces/{namespace}/services/{name}")
        slices = (await api.list(slices_of(namespace, name))).items
    except ApiError:
        return None
    target = _target(about, port)
    found = [] if target is None else found_in(slices, target)
    called = target or next((each.address.rpartition(":")[2] for each in found), "")
    return _problem(
        host,
        sorted(engine.address for engine in found if not engine.terminating),
        f"discover: {{endpoint_slices: {{service: {name}, namespace: {namespace}, port: {called}}}}}",
    )


def _problem(host: str, engines: Sequence[str], instead: str) -> str | None:
    if len(engines) < 2:
        return None
    shown = ", ".join(engines[:3]) + (f" and {len(engines) - 3} more" if len(engines) > 3 else "")
    return (
        f"{host} stands for {len(engines)} engines ({shown}), and each request would go to any of them; name one, or "
        f"let all be found with {instead}"
    )


def _target(service: Object, port: int) -> str | None:
    """Return what a Service's port is called in its slices: "" if it has one port only."""
    for offered in service.get("spec", {}).get("ports") or ():
        if offered.get("port") == port:
            return str(offered.get("name") or "")
    return None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True
