"""The table of the admin listener's RPCs: none is missing, and what changes something is known as such."""

from __future__ import annotations

from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tritonclient.grpc import service_pb2

from sidecar.access.principal import Action
from sidecar.fronts.admin.verbs import VERBS, Sight
from sidecar.proto import admin_pb2 as pb

READS = {
    "Adapters": {"Get", "List", "Watch", "Verify"},
    "Backends": {"List", "Get"},
    "Configuration": {"Get"},
    "Pool": {"Watch"},
    "Queues": {"Get", "List", "Show"},
    "Replicas": {"List"},
    "Access": {"ListKeys", "ListLimits", "Check", "WhoAmI", "GetUsage", "ReadAudit"},
}
"""RPCs that change nothing, by service. Every other RPC of ours leaves a line in the audit."""
TRITON_CHANGES = {"RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings"}
NO_SIGHT: Any = None


def paths(*modules: Any) -> set[str]:
    """Return the paths of all methods of all services that modules of generated code describe."""
    return {
        f"/{service.full_name}/{method.name}"
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


def test_every_rpc_is_in_the_table() -> None:
    """A new RPC needs a row: the listener refuses one that has none."""
    assert set(VERBS) == paths(pb, service_pb2, health_pb2, reflection_pb2)


def message_of(path: str) -> Any:
    """Return an empty message of the type that a method of ours takes."""
    _, service, name = path.split("/")
    method = pb.DESCRIPTOR.services_by_name[service.rpartition(".")[2]].methods_by_name[name]
    return getattr(pb, method.input_type.name)()


@pytest.mark.parametrize("path", sorted(paths(pb)))
def test_what_changes_something_is_audited(path: str) -> None:
    _, service, name = path.split("/")
    verb = VERBS[path]
    assert verb.changes(message_of(path)) is (name not in READS[service.rpartition(".")[2]])
    assert (verb.action is None) is (name == "WhoAmI")


@pytest.mark.parametrize(
    "name", sorted(service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name)
)
def test_triton_s_verbs(name: str) -> None:
    """Settings are changed by those calls only that have some; the verbs of the data listener are refused anyway."""
    verb = VERBS[f"/inference.GRPCInferenceService/{name}"]
    empty = getattr(service_pb2, f"{name}Request", service_pb2.ModelInferRequest)()
    if name not in TRITON_CHANGES:
        assert not verb.changes(empty)
        return
    assert verb.action is Action.DRAIN
    if hasattr(empty, "settings"):
        assert not verb.changes(empty)
        empty.settings["log_verbose_level" if name == "LogSettings" else "trace_level"].SetInParent()
    assert verb.changes(empty)


def test_no_secret_is_told() -> None:
    """Of a new key the audit has all but the secret."""
    key = pb.Key(id="0123456789ab", tenant="acme", roles=["viewer"], note="ci", state="active")
    told = VERBS["/lorasidecar.v1.Access/CreateKey"].outcome(pb.CreateKeyResponse(secret="lsk_s3cret", key=key))
    assert told == {"id": "0123456789ab", "tenant": "acme", "roles": ["viewer"], "note": "ci", "state": "active"}
    assert VERBS["/lorasidecar.v1.Access/CreateKey"].facts(pb.CreateKeyRequest(), Sight(NO_SIGHT)) == {}
