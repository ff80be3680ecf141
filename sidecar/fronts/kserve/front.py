"""The KServe v2 service: an unmodified Triton client changes its address, names an adapter and drops the weights.

`add_kserve` adds the verbs of the data listener, `add_kserve_admin` those of the admin listener, which change or show
how a server runs. The repository's index only lists models, and is on both: on data with the adapters, on admin as the
engines have it. `infer` has inference.

Register clients' shared memory with every backend, apart from the sidecar's own regions.

A client sees its own regions only (`owners`). The sidecar's are neither shown nor unregistered, and no request may read
or write them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.access.principal import SYSTEM, Action
from sidecar.adapters.shared_memory import PREFIX
from sidecar.config import Config
from sidecar.config.identities import Shape, clipped, problem_of
from sidecar.errors import Reason, Refused
from sidecar.fronts import callers
from sidecar.fronts.callers import id_of_call
from sidecar.fronts.kserve.adapters import AdapterVerbs
from sidecar.fronts.kserve.infer import KServe
from sidecar.fronts.kserve.owners import Caller, RegionOwners, ours
from sidecar.fronts.kserve.verbs import (
    Later,
    Verb,
    Verbs,
    abort_with_first,
    errors_of,
    of_engines,
    tell_all,
    to_all,
    to_one,
    to_sum,
    verb_handler,
)
from sidecar.fronts.status import abort, id_metadata
from sidecar.shell.gateway import Gateway

STATUS, REGISTER, UNREGISTER = (f"SystemSharedMemory{verb}" for verb in ("Status", "Register", "Unregister"))
REGION_WORD = Shape("the region", 255, 255)
"""A region's name or its key, which is a file name. They are kept for as long as a server may forget the region."""
NO_CUDA = (
    "CUDA shared memory is not served: engines with LoRA refuse inputs in the GPU's memory; register system shared "
    "memory instead, or send the tensors in the request"
)


def region_verbs(gateway: Gateway, later: Later, owners: RegionOwners) -> dict[str, Verb]:
    """Return handlers for the verbs of system shared memory, and for those of CUDA's that have an answer."""
    return {
        STATUS: _status(gateway, owners),
        REGISTER: _register(to_all(gateway, REGISTER, later), owners),
        UNREGISTER: _unregister(gateway, later, owners),
        "CudaSharedMemoryStatus": _no_cuda_status,
        "CudaSharedMemoryUnregister": _no_cuda_unregister,
    }


def _status(gateway: Gateway, owners: RegionOwners) -> Verb:
    """Return a handler that asks for all regions: what an engine says of one would tell whether it is there."""

    async def handle(request: Any, context: Any) -> Any:
        caller, wanted = await _caller(owners, context), request.name
        shown = {wanted} if wanted else set(owners.of_connection(caller))
        if wanted.startswith(PREFIX) or owners.is_anothers(wanted, caller):
            shown = set()
        ask = to_one(gateway, STATUS, lambda reply: not wanted or bool(shown & set(reply.regions)))
        reply = await ask(service_pb2.SystemSharedMemoryStatusRequest(), context)
        for name in [name for name in reply.regions if name not in shown]:
            del reply.regions[name]
        if wanted and not reply.regions:
            await _not_found(context, f"Unable to find system shared memory region: '{clipped(wanted)}'")
        return reply

    return handle


def _register(tell: Verb, owners: RegionOwners) -> Verb:
    """Return a handler that refuses names and keys of the sidecar's, and names of another client's."""

    async def handle(request: Any, context: Any) -> Any:
        await _check(request, context)
        caller, name = await _caller(owners, context), request.name
        if owners.is_anothers(name, caller):
            taken = f"shared memory region '{clipped(name)}' already in manager"
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, taken, id_metadata(id_of_call(context)))
        before = owners.owner(name)
        try:
            owners.register(name, caller)
        except Refused as refused:
            await abort(context, refused)
        try:
            return await tell(request, context)
        except BaseException:
            owners.restore(name, before)
            raise

    return handle


async def _caller(owners: RegionOwners, context: Any) -> Caller:
    """Return the caller, or end a call whose metadata is malformed."""
    try:
        return owners.caller(context)
    except Refused as refused:
        await abort(context, refused)


async def _check(request: Any, context: Any) -> None:
    """End a call whose region has a malformed name or key, or one of the sidecar's own."""
    for what, word in (("name", request.name), ("key", getattr(request, "key", ""))):
        if problem := problem_of(REGION_WORD, word):
            await abort(context, Refused(Reason.INVALID_REQUEST, f"the region's {what} {problem}"))
    key = getattr(request, "key", "").removeprefix("/")
    if "/" in key or key in (".", ".."):  # another path to a file that also has a plain name
        problem = f'the region\'s key is "{clipped(request.key)}"; name a file in shared memory, without folders'
        await abort(context, Refused(Reason.INVALID_REQUEST, problem))
    for what in (request.name, key):
        if what.startswith(PREFIX):
            await abort(context, ours("the region is", what))


def _unregister(gateway: Gateway, later: Later, owners: RegionOwners) -> Verb:
    tell_one = to_all(gateway, UNREGISTER, later)

    async def handle(request: Any, context: Any) -> Any:
        caller = await _caller(owners, context)
        if request.name:
            await _check(request, context)
            if owners.is_anothers(request.name, caller):  # Triton reports no error for an unknown region
                return service_pb2.SystemSharedMemoryUnregisterResponse()
            reply = await tell_one(request, context)
            owners.forget(request.name)
            return reply
        errors: list[grpc.aio.AioRpcError] = []
        for name in owners.of_connection(caller):
            one = service_pb2.SystemSharedMemoryUnregisterRequest(name=name)
            failed = errors_of(replies := await tell_all(gateway, UNREGISTER, one, later))
            errors += failed
            if not replies:
                await abort_with_first(context, UNREGISTER, errors)
            if not failed:
                owners.forget(name)
        if errors:
            await abort_with_first(context, UNREGISTER, errors)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    return handle


async def _not_found(context: Any, message: str) -> NoReturn:
    await context.abort(grpc.StatusCode.NOT_FOUND, message, id_metadata(id_of_call(context)))
    raise AssertionError("abort does not return")


async def _no_cuda_status(request: Any, context: Any) -> Any:
    """Answer that nothing is registered. That is true, and programs that only look can go on."""
    if request.name:
        message = f"Unable to find cuda shared memory region: '{clipped(request.name)}'; {NO_CUDA}"
        await _not_found(context, message)
    return service_pb2.CudaSharedMemoryStatusResponse()


async def _no_cuda_unregister(request: Any, context: Any) -> Any:
    """Answer as Triton does if there is nothing: many programs unregister all regions before they begin."""
    return service_pb2.CudaSharedMemoryUnregisterResponse()


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
