"""Show adapters and base models to Triton's clients: in the repository's index, and to who asks for a model so called.

An engine's own model of the name comes first. A name that the caller may not see is answered as one that does not
exist. Inference names either in `lora_name`, and in `model_name` the engine's model that `platform` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import time
from typing import Any

import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.access.access import Caller
from sidecar.backends.registry import engines_of
from sidecar.core import eligibility
from sidecar.core.enums import Phase
from sidecar.errors import SidecarError
from sidecar.fronts import callers
from sidecar.fronts.eligible import has_base, is_base, speaks_kserve
from sidecar.fronts.kserve.tensors import LORA_TENSORS
from sidecar.fronts.kserve.verbs import Verb, abort_with_first, ask_one, up
from sidecar.fronts.openai.models import Models
from sidecar.fronts.status import abort
from sidecar.model.reference import Reference
from sidecar.shell.gateway import Gateway
from sidecar.state.records import Record, Version

READY, UNAVAILABLE = "READY", "UNAVAILABLE"


class AdapterVerbs:
    """The verbs about models, over engines, base models and adapters."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._models = Models(gateway)
        self.verbs: dict[str, Verb] = {
            "RepositoryIndex": self._index,
            "ModelReady": self._ready,
            "ModelMetadata": self._metadata,
        }

    async def _index(self, request: Any, context: Any) -> Any:
        reply, errors = await ask_one(self._gateway, "RepositoryIndex", request)
        if reply is None:
            await abort_with_first(context, "RepositoryIndex", errors)
        caller, tenant = await self._sender(context)
        access, records = self._gateway.access, self._gateway.catalogue.registry.all()
        shown = await access.visible(caller, tenant, records)
        for base in dict.fromkeys(self._models.bases(caller).values()):
            is_ready = bool(self._serving_base(base))
            if (is_ready or not request.ready) and self._is_taken(base):
                reply.models.add(name=base, state=READY if is_ready else UNAVAILABLE)
        for record in records:
            if record.name not in shown:
                continue
            is_ready = any(self._serving(record, record.version))
            if is_ready or not request.ready:
                version = str(record.current) if access.may_see_version(caller, record, record.current) else ""
                reply.models.add(name=record.name, version=version, state=READY if is_ready else UNAVAILABLE)
        return reply

    async def _ready(self, request: Any, context: Any) -> Any:
        reply, errors = await ask_one(self._gateway, "ModelReady", request, lambda reply: bool(reply.ready))
        if reply is None or not reply.ready:
            found = await self._found(request, context)
            if found is not None:
                return service_pb2.ModelReadyResponse(ready=bool(found[1]))
        if reply is None:
            await abort_with_first(context, "ModelReady", errors)
        return reply

    async def _metadata(self, request: Any, context: Any) -> Any:
        reply, errors = await ask_one(self._gateway, "ModelMetadata", request)
        if reply is None:
            found = await self._found(request, context)
            if found is not None:
                reply = await self._described(request.name, *found, errors)
        if reply is None:
            await abort_with_first(context, "ModelMetadata", errors)
        return reply

    async def _described(
        self, name: str, versions: list[str], serving: list[str], errors: list[grpc.aio.AioRpcError]
    ) -> Any:
        """Return the metadata of a model that serves an adapter or base model, under its name; None if none does."""
        endpoints = [self._gateway.backends[backend] for backend in serving]
        for endpoint, model_name in ((each, model_name) for each in endpoints for model_name in each.own_models):
            try:
                model = await endpoint.call("ModelMetadata", service_pb2.ModelMetadataRequest(name=model_name))
            except grpc.aio.AioRpcError as error:
                errors.append(error)
                continue
            inputs = [each for each in model.inputs if each.name not in LORA_TENSORS]
            platform = f"lora_name of {model.name}"
            return service_pb2.ModelMetadataResponse(
                name=name, versions=versions, platform=platform, inputs=inputs, outputs=model.outputs
            )
        return None

    async def _found(self, request: Any, context: Any) -> tuple[list[str], list[str]] | None:
        """Return versions and serving backends of the adapter or base model that a request names; None if its sender
        may not see it, or a client of KServe cannot name it.
        """
        caller, tenant = await self._sender(context)
        name, selector = Reference.of(request.name)
        record = self._gateway.catalogue.registry.get(name)
        if record is None:
            return self._found_base(request, caller)
        if not self._gateway.access.may_see(caller, tenant, record):
            return None
        selector = selector or (f"v{request.version}" if request.version else "")
        version = record.selected(selector) if selector else record.version
        if version is None:
            return None
        if selector and not self._gateway.access.may_see_version(caller, record, version.ordinal):
            return None
        return [str(version.ordinal)], list(self._serving(record, version))

    def _found_base(self, request: Any, caller: Caller) -> tuple[list[str], list[str]] | None:
        """Return no versions, for a base model has none, and the backends that serve it."""
        name = request.name
        if not name or request.version or not is_base(self._gateway.state, name) or not self._is_taken(name):
            return None
        return ([], self._serving_base(name)) if self._models.may_use_base(caller, name) else None

    async def _sender(self, context: Any) -> tuple[Caller, str]:
        """Return who calls, and its tenant; end a call whose words about it are refused."""
        caller = callers.CALLER.get()
        try:
            claims = callers.claimed_tenants(callers.metadata_of(context), "")
            return caller, self._gateway.access.tenant_of(caller, claims, callers.id_of_call(context))
        except SidecarError as error:
            await abort(context, error)

    def _serving(self, record: Record, version: Version) -> Iterator[str]:
        """Yield the backends at which clients of KServe can use a version now."""
        state = self._gateway.state
        name = state.names.get(record.name)
        digest = None if name is None else name.versions.get(version.ordinal)
        if digest is None or state.versions[digest].quarantined or record.paused_until > time():
            return
        for backend in eligibility.servers_of(state, digest):
            if backend.phase is Phase.UP and speaks_kserve(backend.facts):
                yield backend.id

    def _serving_base(self, name: str) -> list[str]:
        state = self._gateway.state
        return [backend for backend in up(self._gateway) if has_base(state.backends[backend].facts, name)]

    def _is_taken(self, base: str) -> bool:
        """Return True if a client of KServe can name a base model: an engine that it can ask has it, up or down."""
        return any(speaks_kserve(facts) and has_base(facts, base) for facts in engines_of(self._gateway.state))
