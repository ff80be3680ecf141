"""The engines behind a Service, as its EndpointSlices tell: each pod at an address of its own, ready or leaving."""

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
"""Address types of slices, those first that are preferred where a pod has both; names (FQDN) are not read."""


class EndpointSlices:
    """Finds the engines of one Service (`discovery.found.Finder`).

    `port` is what the Service calls it ("" where it has one without a name), or its number in the pods.
    """

    def __init__(self, access: Access, namespace: str, service: str, port: str | int) -> None:
        self._access = access
        self._service = service
        self._port = port
        self._collection = slices_of(namespace, service)
        self._told = ""

    @classmethod
    def in_cluster(cls, service: str, port: str | int, namespace: str | None = None) -> EndpointSlices:
        """Return those of the cluster that this process belongs to. Raises Misused if there is none."""
        access = find_access()
        return cls(access, namespace or access.namespace, service, port)

    async def watch(self) -> AsyncGenerator[frozenset[Found], None]:
        """Yield the whole set, at first and whenever it has changed, for ever."""
        known: frozenset[Found] | None = None
        api = Api(self._access)
        try:
            async with aclosing(Mirror(api, self._collection).watch()) as all_slices:
                async for slices in all_slices:
                    found = found_in(slices.values(), self._port)
                    self._tell(slices, found)
                    if found != known:
                        known = found
                        yield found
        finally:
            await api.close()

    def _tell(self, slices: dict[str, Object], found: frozenset[Found]) -> None:
        """Say once what may be wrong with a Service that has no engine."""
        where = f"the Service {self._service} in {self._collection.namespace}"
        why = ""
        if not slices:
            why = f"{where} has no EndpointSlice; is that its name, and its namespace?"
        elif not found and any(part.get("endpoints") for part in slices.values()):
            offered = sorted({_port_words(port) for part in slices.values() for port in part.get("ports") or ()})
            why = f"{where} has no port {self._port}; it has {', '.join(offered) or 'none'}"
        if why and why != self._told:
            logger.warning("%s", why)
        self._told = why


def slices_of(namespace: str, service: str) -> Collection:
    """Return the slices of a Service."""
    return Collection("discovery.k8s.io", "v1", "endpointslices", namespace, f"{SERVICE_LABEL}={service}")


def found_in(slices: Iterable[Object], port: str | int) -> frozenset[Found]:
    """Return the endpoints of all slices of a Service that have the port, each pod once.

    A pod that is in several slices, because it has addresses of both families or is just being moved between two, is
    taken at its IPv4 address where it has one; of equal ones at that which is ready.
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
            ready=conditions.get("ready") is not False,  # not said means yes
            terminating=conditions.get("terminating") is True,
        )


def _number_of(part: Object, port: str | int) -> int | None:
    """Return the number that a port has in a slice; a name may have another one in each."""
    for offered in part.get("ports") or ():
        number = offered.get("port")
        if number is not None and str(port) in (offered.get("name") or "", str(number)):
            return int(number)
    return None


def _port_words(port: Object) -> str:
    return f"{port.get('name') or 'unnamed'} ({port.get('port')})"
