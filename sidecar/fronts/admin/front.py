"""The services `lorasidecar.v1.{Backends,Queues,Replicas}`, and `add_admin`, which adds all to a server."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic_ns
from typing import Any

from policies.at_most import at_most
from sidecar.access.access import Caller
from sidecar.access.principal import Action
from sidecar.fronts import callers
from sidecar.fronts.admin.adapters import AdaptersService
from sidecar.fronts.admin.configuration import Changes, ConfigurationService, checked
from sidecar.fronts.admin.own_tenant import confined_to
from sidecar.fronts.admin.pool import PoolService
from sidecar.fronts.eligible import is_base
from sidecar.fronts.status import answers_errors
from sidecar.ownership.facts import Member
from sidecar.proto import admin_pb2, admin_pb2_grpc
from sidecar.proto.filling import filled
from sidecar.replicas.replica import Replica
from sidecar.shell.chronicle import story
from sidecar.shell.gateway import Gateway
from sidecar.shell.open_requests import Chosen, beyond, cancel, check_chosen, names_in, open_requests
from sidecar.telling.pool import backend_message, backend_messages
from sidecar.telling.queue import EXAMINED_MAX, queue_message
from sidecar.telling.wording import lines_of, record_of

RPCS = tuple(method.name for method in admin_pb2.DESCRIPTOR.services_by_name["Access"].methods)


class AccessService(admin_pb2_grpc.AccessServicer):
    """Gives each RPC to the part that has a method of its name; the others answer UNIMPLEMENTED.

    A part is an object with methods as a servicer has them: `async def SetLimit(self, request, context)`.
    """

    def __init__(self, *parts: object) -> None:
        for part in parts:
            for name in RPCS:
                if hasattr(part, name):
                    setattr(self, name, getattr(part, name))


logger = logging.getLogger(__name__)

LISTED_DEFAULT = 100
LISTED_MAX = EXAMINED_MAX


def add_admin(
    server: Any,
    gateway: Gateway,
    replica: Replica | None = None,
    access: Sequence[object] = (),
    changes: Changes | None = None,
) -> None:
    """Add the admin services to a gRPC server. `access` has the parts of the service Access; without `changes` the
    configuration does not change.
    """
    services: Any = admin_pb2_grpc
    services.add_AdaptersServicer_to_server(AdaptersService(gateway), server)
    services.add_BackendsServicer_to_server(BackendsService(gateway, replica, changes), server)
    services.add_ConfigurationServicer_to_server(ConfigurationService(changes), server)
    services.add_ReplicasServicer_to_server(ReplicasService(replica), server)
    services.add_QueuesServicer_to_server(QueuesService(gateway), server)
    me = "" if replica is None else replica.member.id
    services.add_PoolServicer_to_server(PoolService(gateway, me), server)
    services.add_AccessServicer_to_server(AccessService(*access), server)


class BackendsService(admin_pb2_grpc.BackendsServicer):
    """Show backends, take them out of service and back, add and remove them."""

    def __init__(self, gateway: Gateway, replica: Replica | None, changes: Changes | None) -> None:
        self._changes = changes
        self._gateway = gateway
        self._replica = replica

    @answers_errors
    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        messages = backend_messages(self._gateway.state, monotonic_ns())
        return admin_pb2.ListBackendsResponse(backends=map(self._completed, messages))

    @answers_errors
    async def Get(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.known_backend(request.backend)
        return self._backend(request.backend)

    @answers_errors
    async def Drain(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._set_drain(request.backend, True)

    @answers_errors
    async def Undrain(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._set_drain(request.backend, False)

    @answers_errors
    async def Add(self, request: Any, context: Any) -> Any:  # noqa: N802
        await checked(self._changes).add_backend(request.backend, request.url, request.like)
        return self._backend(request.backend)

    @answers_errors
    async def Remove(self, request: Any, context: Any) -> Any:  # noqa: N802
        await checked(self._changes).remove_backend(request.backend)
        if request.backend not in self._gateway.state.backends:  # a pool, or one at which nothing ran
            return admin_pb2.Backend(id=request.backend, state="removed")
        return self._backend(request.backend)

    def _set_drain(self, backend: str, draining: bool) -> Any:
        refused = self._gateway.set_drain(backend, draining)
        caller = callers.CALLER.get(Caller())
        who = " ".join(part for part in (caller.principal.subject, caller.peer) if part) or "an operator"
        said = f", {refused} waiting refused: nothing else can serve them" if refused else ""
        logger.info("%s drains%s: asked by %s%s", backend, "" if draining else " no longer", who, said)
        message = self._backend(backend)
        if draining:
            message.refused = refused
        return message

    def _backend(self, backend: str) -> Any:
        return self._completed(backend_message(self._gateway.state, backend, monotonic_ns()))

    def _completed(self, message: Any) -> Any:
        """Return a backend with what its endpoint and the replicas tell of it."""
        endpoint = self._gateway.backends.get(message.id)
        if endpoint is not None:
            message.address = endpoint.address
            differs = self._gateway.fleet.check.differing.get(message.id, "")
            message.detail = "; ".join(part for part in (endpoint.detail(), differs, message.detail) if part)
        known = None if self._replica is None else self._replica.board.standings.get(message.id)
        if known is not None:
            message.owner, message.epoch = known.owner, known.report.epoch
        return message


class QueuesService(admin_pb2_grpc.QueuesServicer):
    """Show the waiting requests, and for each the reason; list and cancel open ones."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    @answers_errors
    async def Get(self, request: Any, context: Any) -> Any:  # noqa: N802
        tenant = confined_to(self._gateway.access, Action.SEE_QUEUE, "", context)
        if request.adapter and tenant is None:
            self._gateway.catalogue.known(request.adapter)
        if request.backend and tenant is None:
            self._gateway.known_backend(request.backend)
        limit = min(request.limit or LISTED_DEFAULT, LISTED_MAX)
        chosen = Chosen(adapter=request.adapter, tenant=tenant or "", backend=request.backend)
        message = queue_message(
            self._gateway.state, monotonic_ns(), request.adapter, request.backend, limit, tenant,
            beyond(self._gateway, chosen),
        )  # fmt: skip
        running = (each for each in open_requests(self._gateway, chosen) if each.state == "running")
        message.runs.extend(at_most(limit, running))
        return message

    @answers_errors
    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        tenant = confined_to(self._gateway.access, Action.SEE_QUEUE, request.tenant, context)
        if request.backend and tenant is None:
            self._gateway.known_backend(request.backend)
        chosen = self._named(Chosen(adapter=request.adapter, tenant=tenant or request.tenant, backend=request.backend))
        found = list(open_requests(self._gateway, chosen))
        if not found and tenant is None:
            self._check_name(request.adapter)
        shown = found[: min(request.limit or LISTED_DEFAULT, LISTED_MAX)]
        return admin_pb2.ListRequestsResponse(requests=shown, total=len(found))

    @answers_errors
    async def Show(self, request: Any, context: Any) -> Any:  # noqa: N802
        tenant = confined_to(self._gateway.access, Action.SEE_QUEUE, "", context)
        timeline = story(self._gateway.chronicle, request.request, monotonic_ns(), tenant)
        return admin_pb2.ShowRequestResponse(lines=lines_of(timeline), record=json.dumps(record_of(timeline)))

    @answers_errors
    async def Cancel(self, request: Any, context: Any) -> Any:  # noqa: N802
        tenant = confined_to(self._gateway.access, Action.CANCEL, request.tenant, context)
        asked = Chosen(request.request_id, request.adapter, request.tenant, only=names_in(request.only))
        check_chosen(asked)
        chosen = self._named(replace(asked, tenant=tenant or request.tenant))
        cancelled = cancel(self._gateway, chosen)
        if not cancelled and tenant is None:
            self._check_name(request.adapter)
        return admin_pb2.CancelResponse(cancelled=cancelled)

    def _named(self, chosen: Chosen) -> Chosen:
        """Return the requests of the base model if its name was given as the adapter's."""
        if not chosen.adapter or not is_base(self._gateway.state, chosen.adapter):
            return chosen
        return replace(chosen, adapter="", only={**chosen.only, "adapter": ""})

    def _check_name(self, adapter: str) -> None:
        """Raise Refused(UNKNOWN_ADAPTER) for an unknown name that has no request: it is misspelt, or long gone."""
        if adapter and not is_base(self._gateway.state, adapter):
            self._gateway.catalogue.known(adapter)


class ReplicasService(admin_pb2_grpc.ReplicasServicer):
    """Show the replicas and the backends that each owns; `replica` is None if the process runs alone."""

    def __init__(self, replica: Replica | None) -> None:
        self._replica = replica

    @answers_errors
    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        replica = self._replica
        members = [] if replica is None else [_message(replica, member) for member in replica.members()]
        return admin_pb2.ListReplicasResponse(replicas=members)


def _message(replica: Replica, member: Member) -> Any:
    is_self = member.id == replica.member.id
    return filled(
        admin_pb2.Replica,
        member,
        address=replica.address if is_self else replica.peers.addresses().get(member.id, ""),
        leads=replica.board.leader == member.id,
        owns=[
            filled(admin_pb2.OwnedBackend, known.report)
            for _, known in sorted(replica.board.standings.items())
            if known.owner == member.id
        ],
        forwards=replica.router.forwards if is_self else 0,
        reroutes=replica.router.reroutes if is_self else 0,
        self=is_self,
    )
