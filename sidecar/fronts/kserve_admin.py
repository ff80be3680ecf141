"""KServe's verbs that change or show how a server runs: repository, log, trace. On the admin listener only."""

from __future__ import annotations

import grpc
import grpc.aio

from sidecar.fronts.kserve import SERVICE, to_all, verb_handler
from sidecar.shell.gateway import Gateway

VERBS = ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings")


def add_kserve_admin(server: grpc.aio.Server, gateway: Gateway) -> None:
    """Add the verbs to a server; each goes to every backend that is up, and the first one's reply comes back."""
    handlers = {verb: verb_handler(verb, to_all(gateway, verb)) for verb in VERBS}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
