"""The KServe v2 service: an unmodified Triton client changes its address, names an adapter and drops the weights.

`add_kserve` adds the verbs of the data listener, `add_kserve_admin` those of the admin listener, which change or show
how a server runs. The repository's index only lists models, and is on both: on data with the adapters, on admin as the
engines have it. `infer` has inference.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.access.principal import SYSTEM, Action
from sidecar.config import Config
from sidecar.errors import Reason, Refused
from sidecar.fronts import callers
from sidecar.fronts.kserve.adapters import AdapterVerbs
from sidecar.fronts.kserve.infer import KServe
from sidecar.fronts.kserve.regions import NO_CUDA, region_verbs
from sidecar.fronts.kserve.verbs import Later, Verb, Verbs, of_engines, to_all, to_one, to_sum, verb_handler
from sidecar.fronts.status import abort
from sidecar.shell.gateway import Gateway

PASSED_ON = ("ServerMetadata", "ModelConfig")
ADMIN_VERBS = ("RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings")
ALL_VERBS = tuple(service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name)
ON_ADMIN = ("RepositoryIndex", *ADMIN_VERBS)
NOT_ON_DATA = dict.fromkeys(
    ADMIN_VERBS, "this verb is served on the sidecar's admin listener only (listeners.admin)"
) | {"CudaSharedMemoryRegister": NO_CUDA}
NOT_ON_ADMIN = dict.fromkeys(
    (verb for verb in ALL_VERBS if verb not in ON_ADMIN), "this verb is served on the sidecar's data listener only"
)
LATEST = "last_inference"
KEYS = {"batch_stats": ("batch_size",), "memory_usage": ("type", "id")}
"""The fields that identify an entry of a repeated field."""


def add_kserve(server: grpc.aio.Server, gateway: Gateway, config: Config) -> KServe:
    """Add the inference verbs and the read-only ones to a server; return the front that holds the streams."""
    front = KServe(gateway, config)
    verbs: dict[str, Verb] = {
        "ModelStatistics": _for_operators(gateway, to_sum(gateway, "ModelStatistics", summed)),
        **{verb: to_one(gateway, verb) for verb in PASSED_ON},
        **AdapterVerbs(gateway).verbs,
        **region_verbs(gateway, Later(gateway), front.regions),
    }
    inference: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(front.infer),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(front.stream_infer),
    }
    verbs = {verb: of_engines(gateway, handle) for verb, handle in verbs.items()}
    verbs |= {"ServerLive": _live, "ServerReady": _ready(gateway)}
    handlers = inference | {verb: verb_handler(verb, handle) for verb, handle in verbs.items()}
    server.add_generic_rpc_handlers((Verbs(handlers, NOT_ON_DATA),))
    return front


def add_kserve_admin(server: grpc.aio.Server, gateway: Gateway) -> None:
    """Add the admin listener's verbs. Each is sent to every backend that is up; the first reply is returned."""
    handlers = {verb: verb_handler(verb, of_engines(gateway, to_all(gateway, verb))) for verb in ON_ADMIN}
    server.add_generic_rpc_handlers((Verbs(handlers, NOT_ON_ADMIN),))


async def _live(request: Any, context: Any) -> Any:
    return service_pb2.ServerLiveResponse(live=True)


def _ready(gateway: Gateway) -> Verb:
    async def handle(request: Any, context: Any) -> Any:
        ready = not gateway.state.draining and gateway.takes_requests
        return service_pb2.ServerReadyResponse(ready=ready)

    return handle


def _for_operators(gateway: Gateway, handle: Verb) -> Verb:
    """Return a handler for those who may see what is of all tenants: engines count the requests of all together."""

    async def checked(request: Any, context: Any) -> Any:
        access, caller, request_id = gateway.access, callers.CALLER.get(), callers.id_of_call(context)
        principal = access.judged(caller)
        decision = None if principal is None else access.decide(principal, Action.SHOW)
        if decision is not None and not decision.allowed:
            access.denied(caller, Action.SHOW, SYSTEM, decision.by, request_id, "ModelStatistics")
            if access.mode == "enforce":
                why = f'you may not see what is of all tenants; ask your operator with id "{request_id}"'
                await abort(context, Refused(Reason.NOT_ALLOWED, why))
        return await handle(request, context)

    return checked


def summed(replies: Iterable[Any]) -> Any:
    """Return one ModelStatisticsResponse with each model and version once: sums, and the latest inference time."""
    models: dict[tuple[str, str], Any] = {}
    for reply in replies:
        for statistics in reply.model_stats:
            found = models.get((statistics.name, statistics.version))
            if found is None:
                models[statistics.name, statistics.version] = _copied(statistics)
            else:
                _add(found, statistics)
    return service_pb2.ModelStatisticsResponse(model_stats=models.values())


def _copied(message: Any) -> Any:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def _add(into: Any, message: Any) -> None:
    """Add a message's numbers to another of its type, field by field; names stay."""
    for field, value in message.ListFields():
        name = field.name
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for key, entry in value.items():
                _add(getattr(into, name)[key], entry)
        elif name in KEYS:
            _add_entries(getattr(into, name), value, KEYS[name])
        elif field.message_type is not None:
            _add(getattr(into, name), value)
        elif isinstance(value, int):
            present = getattr(into, name)
            setattr(into, name, max(present, value) if name == LATEST else present + value)


def _add_entries(into: Any, entries: Any, keys: tuple[str, ...]) -> None:
    present = {tuple(getattr(entry, key) for key in keys): entry for entry in into}
    for entry in entries:
        found = present.get(tuple(getattr(entry, key) for key in keys))
        if found is None:
            into.add().CopyFrom(entry)
            continue
        keyed = {key: getattr(found, key) for key in keys}
        _add(found, entry)
        for key, value in keyed.items():
            setattr(found, key, value)
