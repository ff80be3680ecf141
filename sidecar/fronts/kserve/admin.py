"""KServe's verbs that change or show how a server runs: repository, log, trace. On the admin listener only.

The repository's index, which only shows what models there are, is on both.
"""

from __future__ import annotations

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2

from sidecar.fronts.kserve.verbs import Verbs, to_all, verb_handler
from sidecar.shell.gateway import Gateway

ADMIN_VERBS = ("RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings")
VERBS = ("RepositoryIndex", *ADMIN_VERBS)
ALL_VERBS = tuple(service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name)
ELSEWHERE = dict.fromkeys(
    (verb for verb in ALL_VERBS if verb not in VERBS), "this verb is served on the sidecar's data listener only"
)


def add_kserve_admin(server: grpc.aio.Server, gateway: Gateway) -> None:
    """Add the verbs to a server; each goes to every backend that is up, and the first one's reply comes back."""
    handlers = {verb: verb_handler(verb, to_all(gateway, verb)) for verb in VERBS}
    server.add_generic_rpc_handlers((Verbs(handlers, ELSEWHERE),))
