"""The KServe v2 front: an unmodified Triton client changes its address, names an adapter and drops the weights.

Here is the service on the data listener, verb by verb; `kserve_infer` has inference, `kserve_admin` what is on the
admin listener.
"""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.config import Config
from sidecar.fronts.kserve.admin import ADMIN_VERBS
from sidecar.fronts.kserve.infer import KServe
from sidecar.fronts.kserve.later import Later
from sidecar.fronts.kserve.regions import NO_CUDA, region_verbs
from sidecar.fronts.kserve.statistics import summed
from sidecar.fronts.kserve.verbs import Verb, Verbs, to_one, to_sum, verb_handler
from sidecar.shell.gateway import Gateway

PASSED_ON = ("ServerMetadata", "ModelMetadata", "ModelConfig", "RepositoryIndex")
ELSEWHERE = dict.fromkeys(ADMIN_VERBS, "this verb is served on the sidecar's admin listener only (listeners.admin)") | {
    "CudaSharedMemoryRegister": NO_CUDA
}


def add_kserve(server: grpc.aio.Server, gateway: Gateway, config: Config) -> KServe:
    """Add the inference verbs and the read-only ones to a server; return the front that has the streams."""
    front = KServe(gateway, config)
    verbs: dict[str, Verb] = {
        "ServerLive": _live,
        "ServerReady": _ready(gateway),
        "ModelReady": to_one(gateway, "ModelReady", lambda reply: bool(reply.ready)),
        "ModelStatistics": to_sum(gateway, "ModelStatistics", summed),
        **{verb: to_one(gateway, verb) for verb in PASSED_ON},
        **region_verbs(gateway, Later(gateway), front.regions),
    }
    inference: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "ModelInfer": grpc.unary_unary_rpc_method_handler(front.infer),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(front.stream_infer),
    }
    handlers = inference | {verb: verb_handler(verb, handle) for verb, handle in verbs.items()}
    server.add_generic_rpc_handlers((Verbs(handlers, ELSEWHERE),))
    return front


async def _live(request: Any, context: Any) -> Any:
    return service_pb2.ServerLiveResponse(live=True)


def _ready(gateway: Gateway) -> Verb:
    async def handle(request: Any, context: Any) -> Any:
        ready = not gateway.state.draining and gateway.takes_requests
        return service_pb2.ServerReadyResponse(ready=ready)

    return handle
