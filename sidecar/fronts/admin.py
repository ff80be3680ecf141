"""The control plane, `lorasidecar.v1.{Adapters,Backends,Queues}`: what operators ask of the gateway and see of it."""

from __future__ import annotations

import asyncio
from time import monotonic_ns
from typing import Any

from sidecar.core import queries, waiting
from sidecar.core.effects import Answer
from sidecar.fronts.status import answers_errors
from sidecar.proto import admin_pb2, admin_pb2_grpc
from sidecar.shell.gateway import Gateway

LISTED_DEFAULT = 100
LISTED_MAX = waiting.EXAMINED_MAX
LISTED_A_TURN = 50
"""Adapters put into a list before the event loop gets to do something else."""


def add_admin(server: Any, gateway: Gateway) -> None:
    """Serve the three admin services on a gRPC server."""
    services: Any = admin_pb2_grpc
    services.add_AdaptersServicer_to_server(AdaptersService(gateway), server)
    services.add_BackendsServicer_to_server(BackendsService(gateway), server)
    services.add_QueuesServicer_to_server(QueuesService(gateway), server)


class AdaptersService(admin_pb2_grpc.AdaptersServicer):
    """Registers, shows, moves and forgets adapters."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    @answers_errors
    async def Register(self, request: Any, context: Any) -> Any:  # noqa: N802 — gRPC's names, here and below
        _, unchanged = await self._gateway.register(request.name, request.path, tuple(request.allow), request.pin)
        return admin_pb2.RegisterResponse(adapter=self._adapter(request.name), unchanged=unchanged)

    @answers_errors
    async def Get(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._known(request.name)

    @answers_errors
    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        response = admin_pb2.ListAdaptersResponse()
        for number, view in enumerate(queries.adapter_views(self._gateway.state, monotonic_ns()), 1):
            response.adapters.append(adapter_message(view))
            if number % LISTED_A_TURN == 0:
                await asyncio.sleep(0)  # thousands of adapters must not hold up a token
        return response

    @answers_errors
    async def Unregister(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.unregister(request.name)
        return admin_pb2.UnregisterResponse()

    @answers_errors
    async def Evict(self, request: Any, context: Any) -> Any:  # noqa: N802
        return _places(await self._gateway.evict(request.name))

    @answers_errors
    async def Pin(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.set_pin(request.name, True)
        return self._adapter(request.name)

    @answers_errors
    async def Unpin(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.set_pin(request.name, False)
        return self._adapter(request.name)

    @answers_errors
    async def Prefetch(self, request: Any, context: Any) -> Any:  # noqa: N802
        return _places(await self._gateway.prefetch(request.name, tuple(request.backends)))

    @answers_errors
    async def Release(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.release(request.name)
        return self._adapter(request.name)

    def _known(self, name: str) -> Any:
        self._gateway.known(name)
        return self._adapter(name)

    def _adapter(self, name: str) -> Any:
        return adapter_message(queries.adapter_view(self._gateway.state, name, monotonic_ns()))


class BackendsService(admin_pb2_grpc.BackendsServicer):
    """Shows backends, and takes them out of service and back."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    @answers_errors
    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        views = queries.backend_views(self._gateway.state, monotonic_ns())
        return admin_pb2.ListBackendsResponse(backends=[self._message(view) for view in views])

    @answers_errors
    async def Get(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.known_backend(request.backend)
        return self._backend(request.backend)

    @answers_errors
    async def Drain(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.set_drain(request.backend, True)
        return self._backend(request.backend)

    @answers_errors
    async def Undrain(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._gateway.set_drain(request.backend, False)
        return self._backend(request.backend)

    def _backend(self, backend: str) -> Any:
        return self._message(queries.backend_view(self._gateway.state, backend, monotonic_ns()))

    def _message(self, view: queries.BackendView) -> Any:
        message = backend_message(view)
        endpoint = self._gateway.backends.get(view.id)
        if endpoint is not None:
            message.address = endpoint.address
            message.detail = "; ".join(part for part in (endpoint.detail(), *view.notes) if part)
        return message


class QueuesService(admin_pb2_grpc.QueuesServicer):
    """Shows who waits and why."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    @answers_errors
    async def Get(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.adapter:
            self._gateway.known(request.adapter)
        if request.backend:
            self._gateway.known_backend(request.backend)
        limit = min(request.limit or LISTED_DEFAULT, LISTED_MAX)
        return queue_message(
            waiting.queue_view(self._gateway.state, monotonic_ns(), request.adapter, request.backend, limit)
        )


def adapter_message(view: queries.AdapterView) -> Any:
    """Return an adapter as the API shows it."""
    return admin_pb2.Adapter(
        name=view.name,
        version=f"{view.name}@v{view.ordinal}",
        digest=view.digest,
        base_model=view.base_model,
        path=view.origin,
        rank=view.rank,
        modules=view.modules,
        dtype=view.dtype,
        pinned=view.pinned,
        allow=view.allow,
        quarantined=view.quarantined,
        requests=view.requests,
        store=[
            admin_pb2.StoreCopy(
                dtype=copy.dtype,
                state=copy.state,
                size_bytes=copy.size_bytes,
                pins=copy.pins,
                task_id=str(copy.task_id),
            )
            for copy in view.store
        ],
        backends=[
            admin_pb2.Residency(
                backend=place.backend,
                tier=place.tier,
                age_s=place.age_ns / 1e9,
                source=place.source,
                unfit=place.unfit,
            )
            for place in view.backends
        ],
    )


def backend_message(view: queries.BackendView) -> Any:
    """Return a backend as the API shows it; its address is not known here."""
    return admin_pb2.Backend(
        id=view.id,
        kind=view.kind,
        state=view.state,
        base_model=view.base_model,
        dtype=view.dtype,
        rank_max=view.rank_max,
        running=view.running,
        queued=view.queued,
        seats=view.seats,
        host_pages=view.host_pages,
        device_pages=view.device_pages,
        kv_tokens=view.kv_tokens,
        kv_reserved=view.kv_reserved,
        page_limit=view.page_limit,
        open=[_open_message(version) for version in view.open],
        heals=[
            admin_pb2.HealNote(age_s=heal.age_ns / 1e9, reason=heal.reason, adapter=heal.adapter) for heal in view.heals
        ],
        resident=view.resident,
        detail="; ".join(view.notes),
    )


def _open_message(view: queries.OpenView) -> Any:
    return admin_pb2.OpenVersion(
        name=view.name,
        digest=view.digest,
        age_s=view.age_ns / 1e9,
        pages=view.pages,
        running=view.running,
        queued=view.queued,
        pinned_by=view.pinned_by,
    )


def queue_message(view: waiting.QueueView) -> Any:
    """Return the queue as the API shows it."""
    message = admin_pb2.QueueResponse(
        verdict=view.verdict,
        waiting=view.waiting,
        running=view.running,
        why=[admin_pb2.WhyCount(why=why.value, count=count) for why, count in view.why],
    )
    for item in view.requests:
        fields = {"class": item.klass}  # a keyword of Python's
        message.requests.add(
            request=item.request,
            adapter=item.adapter,
            tenant=item.tenant,
            backend=item.backend,
            waited_s=item.waited_ns / 1e9,
            bound_s=item.bound_ns / 1e9,
            why=item.why.value,
            **fields,
        )
    return message


def _places(answer: Answer) -> Any:
    return admin_pb2.PlacesResponse(
        places=[admin_pb2.Place(place=place, result=result) for place, result in answer.lines]
    )
