"""Whether a backend's address is a Service with several endpoints behind one address of its own, which DNS hides.

Each request and each load would go to one of them by chance, and what is resident where could not be known.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Mapping

from sidecar.discovery import several
from sidecar.errors import Misused
from sidecar.kubernetes.access import find_access
from sidecar.kubernetes.api import Api, Object
from sidecar.kubernetes.endpoint_slices import found_in, slices_of
from sidecar.kubernetes.failures import ApiError

PATIENCE_S = 5.0
"""How long the cluster is asked for in all; one that does not say is not waited for."""
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SERVICE = re.compile(rf"({_LABEL})(?:\.({_LABEL})(?:\.svc(?:\.[a-z0-9.-]+)?)?)?\.?\Z")


def service_of(host: str, namespace: str) -> tuple[str, str] | None:
    """Return the Service and the namespace that a host could be in a cluster: `triton`, `triton.ml`, `triton.ml.svc`…

    `namespace` is the asker's own. None for addresses and other names.
    """
    found = _SERVICE.match(host.lower())
    if found is None or _is_address(host):
        return None
    return found[1], found[3] or namespace


def problems(places: Mapping[str, str]) -> dict[str, str]:
    """Say what is wrong with places, HOST:PORT by a key of the caller's, that are several engines, and the way out.

    Nothing is wrong with any where this process belongs to no cluster, or may not look at its Services.
    """

    async def ask() -> dict[str, str]:
        api = Api(access)
        try:
            async with asyncio.timeout(PATIENCE_S):
                found = {key: await problem_of(api, *_host_and_port(place)) for key, place in places.items()}
        except TimeoutError:
            return {}
        finally:
            await api.close()
        return {key: problem for key, problem in found.items() if problem is not None}

    try:
        access = find_access()
    except Misused:
        return {}
    return asyncio.run(ask())


async def problem_of(api: Api, host: str, port: int) -> str | None:
    """Say what is wrong with a backend at a Service that has several endpoints, and what to write instead.

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
    engines = sorted(engine.address for engine in found if not engine.terminating)
    if len(engines) < 2:
        return None
    instead = f"{{endpoint_slices: {{service: {name}, namespace: {namespace}, port: {called}}}}}"
    return several.problem(f"{host} is a Service with {len(engines)} endpoints", engines, instead)


def _host_and_port(place: str) -> tuple[str, int]:
    host, _, port = place.rpartition(":")
    return host.strip("[]"), int(port)


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
