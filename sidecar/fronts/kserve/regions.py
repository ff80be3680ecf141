"""Register clients' shared memory with every backend, apart from the sidecar's own regions.

A client sees its own regions only (`owners`). The sidecar's are neither shown nor unregistered, and no request may read
or write them.
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.adapters.shared_memory import PREFIX
from sidecar.config.identities import Shape, clipped, problem_of
from sidecar.errors import Reason, Refused
from sidecar.fronts.callers import id_of_call
from sidecar.fronts.kserve.owners import Caller, RegionOwners, ours
from sidecar.fronts.kserve.verbs import Later, Verb, abort_with_first, errors_of, tell_all, to_all, to_one
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
