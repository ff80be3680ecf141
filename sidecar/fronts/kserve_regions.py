"""Shared memory of clients' own: registered with every backend, and kept apart from where the sidecar has its blobs.

To a client it is as if there were no regions but clients'. The sidecar's own are neither shown nor unregistered with
"all", and no request may read or write them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.adapters.shared_memory import PREFIX
from sidecar.errors import Reason, Refused
from sidecar.fronts.callers import id_of_call
from sidecar.fronts.kserve_later import Later
from sidecar.fronts.kserve_tensors import REGION
from sidecar.fronts.kserve_verbs import Verb, abort_with_first, ask_all, errors_of, tell_all, to_all, to_one
from sidecar.fronts.status import abort, id_metadata
from sidecar.identities import Shape, clipped, problem_of
from sidecar.shell.gateway import Gateway

STATUS, REGISTER, UNREGISTER = (f"SystemSharedMemory{verb}" for verb in ("Status", "Register", "Unregister"))
REGION_WORD = Shape("the region", 255, 255)
"""Its name and its key, which is a file's: they are kept for as long as the server may forget the region."""
NO_CUDA = (
    "CUDA shared memory is not served: engines with LoRA refuse inputs in the GPU's memory; register system shared "
    "memory instead, or send the tensors in the request"
)


def check_tensors(tensors: Iterable[Any]) -> None:
    """Raise Refused(INVALID_REQUEST) for an input or an output that lies in a region of the sidecar's own."""
    for tensor in tensors:
        if REGION in tensor.parameters and tensor.parameters[REGION].string_param.startswith(PREFIX):
            raise _ours(f"the tensor {clipped(tensor.name)} lies in", tensor.parameters[REGION].string_param)


def _ours(what: str, region: str) -> Refused:
    return Refused(
        Reason.INVALID_REQUEST,
        f'{what} "{clipped(region)}", and names that begin with {PREFIX} are the sidecar\'s own; choose another',
    )


def region_verbs(gateway: Gateway, later: Later) -> dict[str, Verb]:
    """Return the handlers of the verbs of system shared memory, and of CUDA's where they have something to answer."""
    return {
        STATUS: _status(to_one(gateway, STATUS)),
        REGISTER: _guarded(to_all(gateway, REGISTER, later)),
        UNREGISTER: _unregister(gateway, later),
        "CudaSharedMemoryStatus": _no_cuda_status,
        "CudaSharedMemoryUnregister": _no_cuda_unregister,
    }


def _status(ask: Verb) -> Verb:
    async def handle(request: Any, context: Any) -> Any:
        reply = await ask(request, context)
        for name in [name for name in reply.regions if name.startswith(PREFIX)]:
            del reply.regions[name]
        return reply

    return handle


def _guarded(tell: Verb) -> Verb:
    """Return a handler for names and keys that are not the sidecar's."""

    async def handle(request: Any, context: Any) -> Any:
        for what, word in (("name", request.name), ("key", getattr(request, "key", ""))):
            if problem := problem_of(REGION_WORD, word):
                await abort(context, Refused(Reason.INVALID_REQUEST, f"the region's {what} {problem}"))
        for what in (request.name, getattr(request, "key", "").lstrip("/")):
            if what.startswith(PREFIX):
                await abort(context, _ours("the region is", what))
        return await tell(request, context)

    return handle


def _unregister(gateway: Gateway, later: Later) -> Verb:
    tell_one = _guarded(to_all(gateway, UNREGISTER, later))

    async def handle(request: Any, context: Any) -> Any:
        if request.name:
            return await tell_one(request, context)
        shown = await ask_all(gateway, STATUS, service_pb2.SystemSharedMemoryStatusRequest())
        errors = errors_of(shown)
        if len(errors) == len(shown):
            await abort_with_first(context, UNREGISTER, errors)
        for name in _clients_regions(shown.values()):
            one = service_pb2.SystemSharedMemoryUnregisterRequest(name=name)
            errors += errors_of(await tell_all(gateway, UNREGISTER, one, later))
        if errors:
            await abort_with_first(context, UNREGISTER, errors)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    return handle


def _clients_regions(replies: Iterable[Any]) -> list[str]:
    """Return the names in several servers' lists, each once, without the sidecar's own."""
    lists = (reply.regions for reply in replies if not isinstance(reply, grpc.aio.AioRpcError))
    return [name for name in dict.fromkeys(name for names in lists for name in names) if not name.startswith(PREFIX)]


async def _no_cuda_status(request: Any, context: Any) -> Any:
    """Nothing is registered: that is true, and programs that only look go on."""
    if request.name:
        message = f"Unable to find cuda shared memory region: '{clipped(request.name)}'; {NO_CUDA}"
        await context.abort(grpc.StatusCode.NOT_FOUND, message, id_metadata(id_of_call(context)))
    return service_pb2.CudaSharedMemoryStatusResponse()


async def _no_cuda_unregister(request: Any, context: Any) -> Any:
    """As in Triton it is no error that there is nothing: many programs clear all regions before they begin."""
    return service_pb2.CudaSharedMemoryUnregisterResponse()
