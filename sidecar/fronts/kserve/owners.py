"""Record which client owns a region of shared memory. Servers let anybody list, read and unregister all regions.

A client is a tenant at an address; another client may not use, see or unregister its regions. Clients of one machine
without tenants count as one client, so listing and unregistering all is limited further, to the regions that the same
connection has registered. Regions whose registration this process has not seen, as after a restart or at another
replica, are in no list; any client that knows the name may use and unregister them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sidecar.access.access import Access
from sidecar.adapters.shared_memory import PREFIX
from sidecar.config.identities import clipped
from sidecar.errors import Reason, Refused
from sidecar.fronts import callers
from sidecar.fronts.kserve.tensors import REGION

REGIONS_MAX = 1024
"""Regions of one client. All are remembered, so that a restarted server can be told of them again."""


@dataclass(frozen=True)
class Caller:
    """The sender of a call. The tenant comes from the call itself, since region verbs have no parameters."""

    tenant: str
    connection: str

    @property
    def client(self) -> tuple[str, str]:
        """Tenant and address, without the port, which belongs to the connection."""
        return self.tenant, self.connection.rpartition(":")[0]


class RegionOwners:
    """The regions that were registered here, and the caller that registered each."""

    def __init__(self, access: Access, regions_max: int = REGIONS_MAX) -> None:
        self._access = access
        self._regions_max = regions_max
        self._of: dict[str, Caller] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def caller(self, context: Any) -> Caller:
        claims = callers.claimed_tenants(callers.metadata_of(context), "")
        tenant = self._access.tenant_of(callers.CALLER.get(), claims, callers.id_of_call(context))
        return Caller(tenant, str(context.peer()))

    def register(self, name: str, caller: Caller) -> None:
        """Set the owner of a region. Raises Refused(INVALID_REQUEST) if the client has too many."""
        if self._counts.get(caller.client, 0) >= self._regions_max:
            raise Refused(
                Reason.INVALID_REQUEST, f"this client has {self._regions_max} regions registered; unregister some first"
            )
        self.restore(name, caller)

    def forget(self, name: str) -> None:
        caller = self._of.pop(name, None)
        if caller is not None:
            self._counts[caller.client] -= 1
            if not self._counts[caller.client]:
                del self._counts[caller.client]

    def owner(self, name: str) -> Caller | None:
        return self._of.get(name)

    def restore(self, name: str, owner: Caller | None) -> None:
        """Set the owner of a region without a check, for instance back to that before a failed `register`."""
        self.forget(name)
        if owner is not None:
            self._of[name] = owner
            self._counts[owner.client] = self._counts.get(owner.client, 0) + 1

    def is_anothers(self, name: str, caller: Caller) -> bool:
        owner = self._of.get(name)
        return owner is not None and owner.client != caller.client

    def of_connection(self, caller: Caller) -> list[str]:
        return [name for name, owner in self._of.items() if owner == caller]

    def hide(self, tensors: Iterable[Any], context: Any) -> dict[str, str]:
        """Let the engine look for another client's regions under names that nobody has.

        So it answers for them as for regions that do not exist. Returns the client's names by those. Raises
        Refused(INVALID_REQUEST) if a tensor lies in a region of the sidecar's.
        """
        hidden: dict[str, str] = {}
        for tensor in tensors:
            if REGION not in tensor.parameters:
                continue
            name = tensor.parameters[REGION].string_param
            if name.startswith(PREFIX):
                raise ours(f"the tensor {clipped(tensor.name)} lies in", name)
            if self.is_anothers(name, self.caller(context)):
                hidden.setdefault(name, f"{PREFIX}hidden-{len(hidden)}")
                tensor.parameters[REGION].string_param = hidden[name]
        return {nobodys: name for name, nobodys in hidden.items()}


def ours(what: str, region: str) -> Refused:
    return Refused(
        Reason.INVALID_REQUEST,
        f'{what} "{clipped(region)}", and names that begin with {PREFIX} are the sidecar\'s own; choose another',
    )
