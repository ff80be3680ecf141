"""What the pods are given: time to drain, memory for the store, no rights that they do not need."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.e2e.helm.rendering import Object, Renderer, configuration, containers, hooks, one, pods
from tests.kit.kubernetes_rules import ACCOUNT, ROLES

GIB = 1 << 30


def workload(objects: list[Object]) -> Object:
    """Return the workload that has a sidecar in it."""
    found = [each for each in objects if each["kind"] in ("Deployment", "StatefulSet")]
    return next(each for each in found if not each["metadata"]["name"].endswith("-redis"))


def sidecar_of(pod: Object) -> Object:
    """Return the sidecar's container."""
    return next(each for each in containers(pod) if each["name"] == "lora-sidecar")


def test_every_container_is_confined(rendered: dict[str, list[Object]]) -> None:
    """No container has root, a writable root file system, capabilities or free system calls."""
    seen = 0
    for name, objects in rendered.items():
        for pod in pods(objects):
            for container in containers(pod):
                seen += 1
                secured = pod["spec"]["securityContext"] | container["securityContext"]
                where = f"{name}: {container['name']}"
                assert secured["runAsNonRoot"], where
                assert secured["runAsUser"] > 0, where
                assert secured["readOnlyRootFilesystem"], where
                assert not secured["allowPrivilegeEscalation"], where
                assert secured["capabilities"] == {"drop": ["ALL"]}, where
                assert secured["seccompProfile"] == {"type": "RuntimeDefault"}, where
                assert any(mount["mountPath"] == "/tmp" for mount in container.get("volumeMounts", [])) or (
                    container["name"] in ("ready", "lora-sidecar-envoy")
                ), where
    assert seen > 50


def test_no_service_is_read_as_configuration(rendered: dict[str, list[Object]]) -> None:
    """A Service called lora-sidecar-x would set LORA_SIDECAR_X_PORT in every pod that takes service links."""
    assert all(pod["spec"]["enableServiceLinks"] is False for objects in rendered.values() for pod in pods(objects))


@pytest.mark.parametrize("drain_s", [None, 60, 900])
def test_a_gateway_has_time_to_drain(newest: Renderer, drain_s: int | None) -> None:
    """Kubernetes waits for longer than the balancers need to hear of it and the drain may take."""
    config = {} if drain_s is None else {"drain_timeout_s": drain_s}
    pod = workload(newest.objects({"config": config, "preStopSeconds": 7}))["spec"]["template"]
    sidecar = sidecar_of(pod)
    assert sidecar["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > 7 + (drain_s or 300)


def test_memory_is_the_stores_and_the_process(newest: Renderer) -> None:
    """The store's budget comes on top of what the process is given, request and limit, in any unit."""
    values = {
        "store": {"memory_bytes": 8 * GIB},
        "resources": {"requests": {"cpu": 1, "memory": "1.5Gi"}, "limits": {"memory": 2_000_000_000}},
    }
    resources = sidecar_of(workload(newest.objects(values))["spec"]["template"])["resources"]
    assert resources["requests"] == {"cpu": 1, "memory": str(8 * GIB + GIB * 3 // 2)}
    assert resources["limits"] == {"memory": str(8 * GIB + 2_000_000_000)}


def test_probes(rendered: dict[str, list[Object]]) -> None:
    """Liveness is about the process alone, readiness about whether it can serve; with TLS where it is on."""
    schemes = set()
    for name, objects in rendered.items():
        for pod in pods(objects):
            for container in containers(pod):
                if container["name"] == "lora-sidecar":
                    probes = {
                        kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")
                    }
                    paths = {kind: probe["path"] for kind, probe in probes.items()}
                    assert paths == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}, name
                    listener = yaml.safe_load(configuration(objects))["listeners"]["probes"]
                    named = {port["name"]: port["containerPort"] for port in container["ports"]}
                    assert {named[probe["port"]] for probe in probes.values()} == {9005}, name
                    assert listener["address"].endswith(":9005"), name
                    secure = "tls" in listener
                    assert {probe.get("scheme", "HTTP") for probe in probes.values()} == {"HTTPS" if secure else "HTTP"}
                    schemes.add(secure)
    assert schemes == {True, False}


def test_account_token_only_where_it_is_used(rendered: dict[str, list[Object]]) -> None:
    """A pod has a token for the Kubernetes API only if it asks it: for adapters, EndpointSlices or its keys."""
    seen = set()
    for name, objects in rendered.items():
        record = yaml.safe_load(configuration(objects))
        asks = "kubernetes" in record or "endpoint_slices" in str(record["backends"])
        asks |= "/var/run/secrets/kubernetes.io/serviceaccount/token" in str(record["identity"])
        for pod in pods(objects):
            names = {container["name"] for container in containers(pod)}
            assert pod["spec"]["automountServiceAccountToken"] == (
                "keys" in names or (asks and "lora-sidecar" in names)
            ), name
        seen.add(asks)
    assert seen == {True, False}


def test_rights(newest: Renderer) -> None:
    """Roles have what is asked for and no more: nothing of the cluster's, and only states and events can be written."""
    engines = {"discover": {"endpoint_slices": {"service": "t", "port": 8001}}, "id": "t", "kind": "triton"}
    there = {"discover": {"endpoint_slices": {"service": "u", "port": 8001, "namespace": "models"}}, "id": "u"}
    values = {"backends": [engines, {**there, "kind": "triton"}], "declared": {"customResources": True}}
    roles = [found for found in newest.objects(values) if found["kind"] == "Role" and not hooks(found)]
    rules = {(role["metadata"]["namespace"], role["metadata"]["name"]): role["rules"] for role in roles}
    reading = ["get", "list", "watch"]
    slices = [{"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": reading}]
    assert rules == {
        ("lora", "pool-lora-sidecar-engines"): slices,
        ("models", "pool-lora-sidecar-engines"): slices,
        ("lora", "pool-lora-sidecar-adapters"): [
            {"apiGroups": ["lora-sidecar.io"], "resources": ["loraadapters"], "verbs": reading},
            {"apiGroups": ["lora-sidecar.io"], "resources": ["loraadapters/status"], "verbs": ["patch"]},
            {"apiGroups": ["events.k8s.io"], "resources": ["events"], "verbs": ["create"]},
        ],
    }
    usual = [found for found in newest.objects({}) if not hooks(found)]
    assert not [found for found in usual if found["kind"] in ("Role", "RoleBinding")]


def test_the_tests_accounts_are_the_charts(newest: Renderer) -> None:
    """What the tests' API server permits, and what `make e2e-kubernetes` applies, is what the chart comes to."""
    slices = {"endpoint_slices": {"service": "trtllm", "port": "http"}}
    engines = {"id": "gpu", "kind": "trtllm", "discover": slices, "host_versions_max": 100}
    restarted = engines | {"host_versions_on_limit": "drain", "restart": {"delete_pod": True}}
    declared = {"customResources": True, "configMaps": True}
    values = {"fullnameOverride": ACCOUNT, "declared": declared, "backends": [restarted]}
    found = [each for each in newest.objects(values) if each["kind"] in ("ServiceAccount", "Role", "RoleBinding")]
    for each in found:
        each["metadata"] = {"name": each["metadata"]["name"], "namespace": "ml"}
        each.pop("automountServiceAccountToken", None)
        for subject in each.get("subjects", ()):
            subject["namespace"] = "ml"
    assert found == list(yaml.safe_load_all(ROLES.read_text()))


def test_rights_to_restart_engines(newest: Renderer) -> None:
    """Pods may be deleted only where an entry restarts its engines so."""
    slices = {"service": "t", "port": 8000, "namespace": "models"}
    entry = {"id": "t", "kind": "trtllm", "discover": {"endpoint_slices": slices}, "host_versions_max": 100}
    restart = {"restart": {"delete_pod": True}, "host_versions_on_limit": "drain"}

    def deleting(entry: Object) -> list[Object]:
        roles = [found for found in newest.objects({"backends": [entry]}) if found["kind"] == "Role"]
        return [role for role in roles if "pods" in str(role["rules"])]

    (role,) = deleting(entry | restart)
    assert role["metadata"]["namespace"] == "models"
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["delete"]}]
    assert not deleting(entry)
    assert not deleting(entry | {"restart": {"delete_pod": True}})
    assert not deleting(entry | {"restart": {"command": ["x"]}, "host_versions_on_limit": "drain"})


def test_declared_adapters(newest: Renderer) -> None:
    """`adapters` becomes the ConfigMap that the gateway looks for, and the gateway is told to look."""
    adapters = [{"name": "sql", "source": "s3://loras/sql", "tenants": ["a"], "removalGraceSeconds": 5}]
    objects = newest.objects({"adapters": adapters, "declared": {"label": "lora-sidecar.io/adapters=true,team=x"}})
    declared = one(objects, "ConfigMap", "-adapters")
    assert yaml.safe_load(declared["data"]["adapters.yaml"]) == adapters
    assert declared["metadata"]["labels"].items() >= {"lora-sidecar.io/adapters": "true", "team": "x"}.items()
    asked: Any = yaml.safe_load(configuration(objects))["kubernetes"]["adapters"]
    assert asked == {
        "config_maps": True, "custom_resources": False, "label": "lora-sidecar.io/adapters=true,team=x"
    }  # fmt: skip


def test_a_changed_configuration_restarts_pods(newest: Renderer) -> None:
    """It is in a checksum of the pods, and nothing else is: what is only declared is read by those that run."""
    plain = _template(newest, {})
    assert _template(newest, {"config": {"log_format": "text"}}) != plain
    assert _template(newest, {"monitoring": {"rules": {"enabled": True}}, "service": {"dataPort": 80}}) == plain
    one_adapter = {"adapters": [{"name": "a", "source": "/a"}]}
    two_adapters = {"adapters": [{"name": "a", "source": "/a"}, {"name": "b", "source": "/b"}]}
    assert _template(newest, one_adapter) == _template(newest, two_adapters)


TAKEN: dict[str, Any] = {
    "queue": {"tenant_weights": {"a": 2.0}, "classes": {"batch": {}}, "queued_max": 9},
    "store": {"prefetch_bytes_per_s": 9},
    "config": {
        "access": {"limits": [{"requests_per_day": 9}]},
        "adapters": {"roots": ["/a"]},
        "base_requests": "refuse",
        "origins": {"allow": ["https://"]},
    },
    "backends": [{"url": "triton://other:8001"}],
}


@pytest.mark.parametrize("part", TAKEN)
def test_what_a_running_process_takes_restarts_no_pod(newest: Renderer, part: str) -> None:
    """The file in their volume changes, and they watch it."""
    objects = newest.objects({})
    assert yaml.safe_load(configuration(objects))["watch_config"] is True
    assert configuration(newest.objects({part: TAKEN[part]})) != configuration(objects)
    assert _template(newest, {part: TAKEN[part]}) == workload(objects)["spec"]["template"]


def test_other_keys_of_the_same_sections_restart_pods(newest: Renderer) -> None:
    """And pools, whose settings a running process keeps."""
    pool = {"id": "p", "kind": "triton", "discover": {"dns": "engines:8001"}}
    for values in ({"queue": {"ordering": "fifo"}}, {"store": {"memory_bytes": 1 << 30}}, {"backends": [pool]}):
        assert _template(newest, values) != _template(newest, {})


def _template(newest: Renderer, values: dict[str, Any]) -> Object:
    template: Object = workload(newest.objects(values))["spec"]["template"]
    return template
