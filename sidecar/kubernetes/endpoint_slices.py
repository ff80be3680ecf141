"""Find the engines behind a Service from its EndpointSlices: each pod's own address, ready or leaving."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing

from sidecar.discovery.found import Found
from sidecar.kubernetes.access import Access, find_access
from sidecar.kubernetes.api import Api, Collection, Object
from sidecar.kubernetes.mirror import Mirror

logger = logging.getLogger(__name__)

SERVICE_LABEL = "kubernetes.io/service-name"
FAMILIES = ("IPv4", "IPv6")
"""The address types that are read, in order of preference for a pod with both; names (FQDN) are ignored."""


class EndpointSlices:
    """Finds the engines of one Service (implements `discovery.found.Finder`).

    `port` is the port's name in the Service ("" for an unnamed one), or its number in the pods.
    """

    def __init__(self, access: Access, namespace: str, service: str, port: str | int) -> None:
        self._access = access
        self._service = service
        self._port = port
        self._collection = slices_of(namespace, service)
        self._told = ""

    @classmethod
    def in_cluster(cls, service: str, port: str | int, namespace: str | None = None) -> EndpointSlices:
        """Return the slices of a Service in the cluster of this process. Raises Misused outside a cluster."""
        access = find_access()
        return cls(access, namespace or access.namespace, service, port)

    async def watch(self) -> AsyncGenerator[frozenset[Found], None]:
        """Yield the whole set of engines, at first and after each change, for ever."""
        known: frozenset[Found] | None = None
        api = Api(self._access)
        try:
            async with aclosing(Mirror(api, self._collection).watch()) as all_slices:
                async for slices in all_slices:
                    found = found_in(slices.values(), self._port)
                    self._log_missing(slices, found)
                    if found != known:
                        known = found
                        yield found
        finally:
            await api.close()

    def _log_missing(self, slices: dict[str, Object], found: frozenset[Found]) -> None:
        """Log once why a Service may have no engine."""
        where = f"the Service {self._service} in {self._collection.namespace}"
        why = ""
        if not slices:
            why = f"{where} has no EndpointSlice; is that its name, and its namespace?"
        elif not found and any(part.get("endpoints") for part in slices.values()):
            offered = sorted({_describe_port(port) for part in slices.values() for port in part.get("ports") or ()})
            why = f"{where} has no port {self._port}; it has {', '.join(offered) or 'none'}"
        if why and why != self._told:
            logger.warning("%s", why)
        self._told = why


def slices_of(namespace: str, service: str) -> Collection:
    """Return the collection of a Service's EndpointSlices."""
    return Collection("discovery.k8s.io", "v1", "endpointslices", namespace, f"{SERVICE_LABEL}={service}")


def found_in(slices: Iterable[Object], port: str | int) -> frozenset[Found]:
    """Return the endpoints of all slices of a Service that have the port, each pod once.

    A pod may be in several slices, because it has addresses of both families or is being moved between slices. Its IPv4
    address is preferred, then the endpoint that is ready.
    """
    best: dict[str, tuple[tuple[int, bool, bool, str], Found]] = {}
    for part in slices:
        if part.get("addressType") not in FAMILIES:
            continue
        family = FAMILIES.index(part["addressType"])
        for found in _endpoints(part, port):
            rank = (family, not found.ready, found.terminating, found.address)
            if found.name not in best or rank < best[found.name][0]:
                best[found.name] = rank, found
    return frozenset(found for _, found in best.values())


def _endpoints(part: Object, port: str | int) -> Iterator[Found]:
    number = _number_of(part, port)
    if number is None:
        return
    for endpoint in part.get("endpoints") or ():
        addresses = endpoint.get("addresses") or ()
        if not addresses:
            continue
        host = f"[{addresses[0]}]" if part["addressType"] == "IPv6" else addresses[0]
        conditions = endpoint.get("conditions") or {}
        target = endpoint.get("targetRef") or {}
        yield Found(
            name=target["name"] if target.get("kind") == "Pod" and target.get("name") else addresses[0],
            address=f"{host}:{number}",
            ready=conditions.get("ready") is not False,  # unset means ready
            terminating=conditions.get("terminating") is True,
        )


def _number_of(part: Object, port: str | int) -> int | None:
    """Return the port's number in a slice; one name may have different numbers in different slices."""
    for offered in part.get("ports") or ():
        number = offered.get("port")
        if number is not None and str(port) in (offered.get("name") or "", str(number)):
            return int(number)
    return None


def _describe_port(port: Object) -> str:
    return f"{port.get('name') or 'unnamed'} ({port.get('port')})"
