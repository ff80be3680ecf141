"""Detect a backend's address that is a Service with several endpoints behind one cluster IP, which DNS hides.

Each request and each load would go to a random endpoint, so the sidecar could not know which adapters are resident.
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
"""The timeout of all requests to the cluster together; without an answer, no problem is reported."""
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SERVICE = re.compile(rf"({_LABEL})(?:\.({_LABEL})(?:\.svc(?:\.[a-z0-9.-]+)?)?)?\.?\Z")


def service_of(host: str, namespace: str) -> tuple[str, str] | None:
    """Return the Service and namespace that a host name could mean: `triton`, `triton.ml`, `triton.ml.svc`…

    `namespace` is the caller's own. Returns None for addresses and other names.
    """
    found = _SERVICE.match(host.lower())
    if found is None or _is_address(host):
        return None
    return found[1], found[3] or namespace


def problems(places: Mapping[str, str]) -> dict[str, str]:
    """Return, by the caller's keys, the problem and the way out for each HOST:PORT that is several engines.

    Returns nothing if this process is outside a cluster, or may not read its Services.
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
    """Return the problem of a backend at a Service with several endpoints, and the configuration to use instead.

    `port` is the Service's. Returns None for any other host, or if the cluster does not answer.
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
    """Return the name of a Service's port in its slices: "" if it has only one port."""
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
