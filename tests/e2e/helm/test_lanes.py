"""Who carries answers: an Envoy in the sidecar's pod, or a gateway behind an InferencePool."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.helm.installed import CHART, HelmInstalled
from tests.e2e.helm.rendering import NAMESPACE, RELEASE, Object, Renderer, configuration, one
from tests.e2e.helm.test_config import ETC, lay
from tests.e2e.helm.test_network import allowed
from tests.e2e.helm.test_pods import sidecar_of, workload
from tests.kit.cli_runs import Ended, runner

NAME = f"{RELEASE}-lora-sidecar"
ADMISSION = Path(__file__).parent / "admission.py"
DEFINITIONS = "CRD_FILES"
"""Names files with definitions of InferencePool and DestinationRule, by colons."""
GATEWAYS = [{"podSelector": {"matchLabels": {"role": "gateway"}}}]
ENGINE = {"enabled": True, "image": "engine:1"}
ENVOY: dict[str, Any] = {"envoy": {"enabled": True}}
POOL: dict[str, Any] = {
    "inferencePool": {"create": True, "matchLabels": {"app": "vllm"}, "targetPorts": [8000, 8001]},
    "networkPolicy": {"gateways": GATEWAYS},
}
TLS: dict[str, Any] = {"tls": {"picker": {"secretName": "picker-tls"}}}


def envoy_of(objects: list[Object]) -> tuple[Object, Object]:
    """Return the container that writes Envoy's configuration, and Envoy's."""
    inits = workload(objects)["spec"]["template"]["spec"]["initContainers"]
    found = {each["name"]: each for each in inits}
    return found["lora-sidecar-envoy-config"], found["lora-sidecar-envoy"]


def listener(objects: list[Object]) -> Any:
    return yaml.safe_load(configuration(objects))["listeners"].get("endpoint_picker")


def bootstrap_of(objects: list[Object], folder: Path, sidecar: Callable[..., Ended]) -> Any:
    """Run what writes Envoy's configuration, here, and return the configuration."""
    writer, envoy = envoy_of(objects)
    shell, option, script = writer["command"]
    assert (shell, option) == ("/bin/sh", "-c")
    command, written = script.strip().split(">")
    assert written == envoy["args"][envoy["args"].index("--config-path") + 1]
    assert {mount["name"]: mount["mountPath"] for mount in writer["volumeMounts"]}.items() >= {
        mount["name"]: mount["mountPath"] for mount in envoy["volumeMounts"] if mount["mountPath"] == f"{ETC}/envoy"
    }.items()
    assert any(mount["mountPath"] == f"{ETC}/config" for mount in writer["volumeMounts"])
    file, _ = lay(objects, folder)
    program, name, *arguments = command.replace(f"{ETC}/config/config.yaml", str(file)).split()
    assert (program, name) == ("exec", "sidecar")
    done = sidecar(*arguments)
    assert done.code == 0, done.err
    return yaml.safe_load(done.out)


def ports(bootstrap: Any) -> dict[str, tuple[str, int]]:
    """Return where an Envoy listens, its administration and the picker it asks, by their names."""
    found = {each["name"]: each["address"] for each in bootstrap["static_resources"]["listeners"]}
    found["administration"] = bootstrap["admin"]["address"]
    for cluster in bootstrap["static_resources"]["clusters"]:
        if cluster["name"] == "sidecar":
            endpoints = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
            found["picker"] = endpoints[0]["endpoint"]["address"]
    sockets = {name: address["socket_address"] for name, address in found.items()}
    return {name: (socket["address"], socket["port_value"]) for name, socket in sockets.items()}


@pytest.fixture
def sidecar(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run a command of ours, here."""
    return runner(capfd)


def test_without_a_lane_there_is_no_picker(newest: Renderer) -> None:
    """Nor a port, a Service, or a container for one."""
    objects = newest.objects({})
    assert listener(objects) is None
    assert "initContainers" not in workload(objects)["spec"]["template"]["spec"]
    assert not [found for found in objects if found["metadata"]["name"].endswith("-picker")]
    assert 8080 not in allowed(one(objects, "NetworkPolicy", "lora-sidecar"))


@pytest.mark.parametrize("mode", ["gateway", "sidecar"])
@pytest.mark.parametrize("ipv6", [False, True])
def test_envoy_is_where_its_probes_and_clients_are(
    newest: Renderer, tmp_path: Path, sidecar: Callable[..., Ended], mode: str, ipv6: bool
) -> None:
    """The sidecar's own command writes its configuration, by the pod's; all ports of both agree."""
    values = {**ENVOY, "mode": mode, "ipv6": ipv6, "sidecar": {"kind": "vllm"}}
    if mode == "sidecar":
        values["sidecar"] |= {"engine": ENGINE}
    objects = newest.objects(values)
    found = ports(bootstrap_of(objects, tmp_path, sidecar))
    _, envoy = envoy_of(objects)
    everywhere = "::" if ipv6 else "0.0.0.0"
    named = {each["name"]: each["containerPort"] for each in envoy["ports"]}
    assert found["clients"] == (everywhere, named["http-envoy"])
    assert found["ready"] == (everywhere, named["envoy-ready"])
    assert found["administration"] == ("127.0.0.1", 9901)
    assert ":".join(map(str, found["picker"])) == listener(objects)["address"]
    assert listener(objects)["in_path"] == ("[::1]:9002" if ipv6 else "127.0.0.1:9002")
    paths = {kind: envoy[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {kind: probe["path"] for kind, probe in paths.items()} == {
        "startup": "/ready", "readiness": "/ready", "liveness": "/live"
    }  # fmt: skip
    assert {probe["port"] for probe in paths.values()} == {"envoy-ready"}
    [service] = [each for each in one(objects, "Service", NAME)["spec"]["ports"] if each["name"] == "http-envoy"]
    assert (service["port"], service["targetPort"]) == (8080, named["http-envoy"])
    assert named["http-envoy"] in allowed(one(objects, "NetworkPolicy", "lora-sidecar"))
    taken = [yaml.safe_load(configuration(objects))["listeners"][name]["address"] for name in _listeners(objects)]
    assert len(set(taken)) == len(taken)


def _listeners(objects: list[Object]) -> list[str]:
    listeners = yaml.safe_load(configuration(objects))["listeners"]
    return [name for name, each in listeners.items() if isinstance(each, dict) and "address" in each]


def test_an_address_of_the_users_stays(newest: Renderer, tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """Envoy, and the Service, find the picker where the values have it."""
    own = {"config": {"listeners": {"endpoint_picker": {"address": "0.0.0.0:9123", "override_mode": True}}}}
    objects = newest.objects({**ENVOY, **POOL, **own})
    assert listener(objects) == {"address": "0.0.0.0:9123", "override_mode": True}
    assert ports(bootstrap_of(objects, tmp_path, sidecar))["picker"] == ("127.0.0.1", 9123)
    [port] = one(objects, "Service", "-picker")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (9004, 9123)
    assert allowed(one(objects, "NetworkPolicy", "lora-sidecar"))[9123] == GATEWAYS


def test_gateways_are_sent_to_no_address_of_the_pod(newest: Renderer) -> None:
    """What stays in path is reached at loopback by the pod's own Envoy only, and in clear text only."""
    secure = {"envoy": {"enabled": True, "allowCleartext": True}, "tls": {"http": {"secretName": "http-tls"}}}
    for values in ({**ENVOY, **POOL}, POOL, secure):
        assert "in_path" not in listener(newest.objects(values))


def test_envoy_outlives_the_process_that_decides(newest: Renderer) -> None:
    """It starts before, and Kubernetes stops it after the sidecar has drained; until then answers go on through it."""
    pod = workload(newest.objects(ENVOY))["spec"]["template"]["spec"]
    assert [each["name"] for each in pod["initContainers"]] == ["lora-sidecar-envoy-config", "lora-sidecar-envoy"]
    assert [each.get("restartPolicy") for each in pod["initContainers"]] == [None, "Always"]
    assert [each["name"] for each in pod["containers"]] == ["lora-sidecar"]
    assert "lifecycle" not in pod["initContainers"][1]
    python, option, script = sidecar_of({"spec": pod})["lifecycle"]["preStop"]["exec"]["command"]
    assert (python, option) == ("python", "-c")
    assert "http://127.0.0.1:9901/healthcheck/fail" in script
    assert "time.sleep(10)" in script


def test_the_end_waits_though_envoy_has_gone(newest: Renderer) -> None:
    """The hook waits for the balancers whatever becomes of what it asks of Envoy."""
    values = {**ENVOY, "preStopSeconds": 1}
    command = sidecar_of(workload(newest.objects(values))["spec"]["template"])["lifecycle"]["preStop"]["exec"][
        "command"
    ]
    script = command[-1].replace("127.0.0.1:9901", "127.0.0.1:1").replace("time.sleep(1)", "print('waits')")
    done = subprocess.run(["python3", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "waits\n"
    assert "Connection refused" in done.stderr


def test_in_an_engines_pod_envoy_ends_between_engine_and_sidecar(newest: Renderer) -> None:
    """It is the last to start, and the engine's preStop tells it first."""
    values = {**ENVOY, "mode": "sidecar", "sidecar": {"kind": "vllm", "engine": ENGINE}}
    pod = workload(newest.objects(values))["spec"]["template"]["spec"]
    names = ["lora-sidecar", "lora-sidecar-envoy-config", "lora-sidecar-envoy"]
    assert [each["name"] for each in pod["initContainers"]] == names
    [engine] = pod["containers"]
    script = engine["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert script.index("ask http://127.0.0.1:9901/healthcheck/fail") < script.index("ask http://127.0.0.1:9004/drain")
    plain = newest.objects({**values, "envoy": {"enabled": False}})
    assert "9901" not in json.dumps(plain)


def test_envoys_own_values(newest: Renderer) -> None:
    """Image, port of the Service, threads, arguments and resources are those of the values."""
    own = {"enabled": True, "image": "mirror/envoy:1", "port": 80, "threads": 8, "extraArgs": ["--log-level", "warn"]}
    objects = newest.objects({"envoy": own | {"resources": {"limits": {"memory": "2Gi"}}}})
    _, envoy = envoy_of(objects)
    assert envoy["image"] == "mirror/envoy:1"
    assert envoy["command"] == ["/usr/local/bin/envoy"]
    assert envoy["args"][-4:] == ["--concurrency", "8", "--log-level", "warn"]
    assert envoy["resources"]["limits"] == {"memory": "2Gi"}
    [port] = [each for each in one(objects, "Service", NAME)["spec"]["ports"] if each["name"] == "http-envoy"]
    assert (port["port"], port["targetPort"]) == (80, 8080)


def test_envoy_knows_a_picker_with_tls(newest: Renderer, tmp_path: Path, sidecar: Callable[..., Ended]) -> None:
    """It gets the certificate of the CA, and not the key."""
    objects = newest.objects(ENVOY, POOL, TLS)
    _, envoy = envoy_of(objects)
    [mount] = [each for each in envoy["volumeMounts"] if each["name"] == "envoy-ca"]
    [volume] = [each for each in workload(objects)["spec"]["template"]["spec"]["volumes"] if each["name"] == "envoy-ca"]
    assert volume["secret"]["secretName"] == "picker-tls"
    assert volume["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]
    clusters = {each["name"]: each for each in bootstrap_of(objects, tmp_path, sidecar)["static_resources"]["clusters"]}
    context = clusters["sidecar"]["transport_socket"]["typed_config"]["common_tls_context"]["validation_context"]
    assert context == {"trusted_ca": {"filename": f"{mount['mountPath']}/ca.crt"}}


def test_pool(newest: Renderer) -> None:
    """A gateway of the Gateway API finds engines' pods and the picker, and sends nothing past the picker."""
    objects = newest.objects(POOL)
    pool = one(objects, "InferencePool")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert (pool["metadata"]["name"], pool["metadata"]["namespace"]) == (NAME, NAMESPACE)
    assert pool["spec"] == {
        "selector": {"matchLabels": {"app": "vllm"}},
        "targetPorts": [{"number": 8000}, {"number": 8001}],
        "endpointPickerRef": {
            "kind": "Service", "name": f"{NAME}-picker", "port": {"number": 9004}, "failureMode": "FailClose"
        },
    }  # fmt: skip
    [port] = one(objects, "Service", "-picker")["spec"]["ports"]
    assert port == {"name": "grpc-picker", "port": 9004, "targetPort": 9004, "appProtocol": "kubernetes.io/h2c"}
    assert listener(objects) == {"address": "0.0.0.0:9004"}
    assert allowed(one(objects, "NetworkPolicy", "lora-sidecar"))[9004] == GATEWAYS
    named = {port["name"]: port["containerPort"] for port in sidecar_of(workload(objects)["spec"]["template"])["ports"]}
    assert named["grpc-picker"] == 9004
    grpc = newest.objects(POOL, {"inferencePool": {"appProtocol": "kubernetes.io/h2c", "targetPorts": [8001]}})
    assert one(grpc, "InferencePool")["spec"]["appProtocol"] == "kubernetes.io/h2c"


@pytest.mark.parametrize(
    ("given", "rendered"),
    [
        ({"insecureSkipVerify": True}, {"insecureSkipVerify": True}),
        ({"credentialName": "ca"}, {"sni": "HOST", "subjectAltNames": ["HOST"], "credentialName": "ca"}),
        ({"caCertificates": "/ca.crt"}, {"sni": "HOST", "subjectAltNames": ["HOST"], "caCertificates": "/ca.crt"}),
        (
            {"credentialName": "ca", "host": "p.llm.svc.example"},
            {"sni": "p.llm.svc.example", "subjectAltNames": ["p.llm.svc.example"], "credentialName": "ca"},
        ),
    ],
)
def test_istio_speaks_tls_to_the_picker(newest: Renderer, given: dict[str, Any], rendered: dict[str, Any]) -> None:
    """It checks whom it speaks to, unless it is told not to; the picker has a certificate then."""
    objects = newest.objects(POOL, TLS, {"istio": {"destinationRule": {"create": True, **given}}})
    rule = one(objects, "DestinationRule")
    host = given.get("host", f"{NAME}-picker.{NAMESPACE}.svc.cluster.local")
    assert rule["spec"]["host"] == host
    expected = json.loads(json.dumps(rendered).replace("HOST", host))
    assert rule["spec"]["trafficPolicy"] == {"tls": {"mode": "SIMPLE", **expected}}
    assert listener(objects)["tls"] == {
        "certificate": f"{ETC}/tls-picker/tls.crt", "key": f"{ETC}/tls-picker/tls.key"
    }  # fmt: skip
    [port] = one(objects, "Service", "-picker")["spec"]["ports"]
    assert "appProtocol" not in port  # Istio reads gRPC out of its name


@pytest.mark.parametrize(
    ("values", "said", "unsaid"),
    [
        ({}, ["in path: every byte"], ["InferencePool", ":8080"]),
        (ENVOY, [f"http://{NAME}.{NAMESPACE}.svc:8080/v1"], ["in path", "InferencePool"]),
        (POOL, [f"InferencePool {NAME} ", f"{NAME}-picker:9004, without TLS", "FULL_DUPLEX_STREAMED"], ["in path"]),
        ({**POOL, **TLS}, ["saves nothing"], ["without TLS"]),
    ],
)
def test_notes_say_which_lane(newest: Renderer, values: dict[str, Any], said: list[str], unsaid: list[str]) -> None:
    """And what it costs where answers come through the sidecar all the same."""
    file = newest.file({**values, "backends": [{"url": "vllm://v:8000"}]})
    command = ["install", RELEASE, "--namespace", NAMESPACE, "--values", str(file), "--dry-run=client"]
    done = newest.tools.run(newest.program, *command, str(CHART))
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    assert [text for text in said if text not in notes] == []
    assert [text for text in unsaid if text in notes] == []


@pytest.mark.skipif(DEFINITIONS not in os.environ, reason=f"{DEFINITIONS} names no definitions of custom resources")
def test_definitions_take_them(tools: HelmInstalled, rendered: dict[str, list[Object]]) -> None:
    """The definitions of a cluster of yours take every InferencePool and DestinationRule, with no unknown key."""
    schemas = {}
    for file in os.environ[DEFINITIONS].split(":"):
        for found in yaml.safe_load_all(Path(file).read_text()):
            for version in (found or {}).get("spec", {}).get("versions", []):
                kind = f"{found['spec']['group']}/{version['name']} {found['spec']['names']['kind']}"
                schemas[kind] = {
                    "properties": {"spec": _closed(version["schema"]["openAPIV3Schema"]["properties"]["spec"])}
                }
    seen: dict[str, list[Object]] = {}
    for objects in rendered.values():
        for each in objects:
            seen.setdefault(f"{each['apiVersion']} {each['kind']}", []).append(each)
    for kind in ("inference.networking.k8s.io/v1 InferencePool", "networking.istio.io/v1 DestinationRule"):
        if kind in schemas:
            asked = {"schema": schemas[kind], "pairs": [[{"spec": each["spec"]}, None] for each in seen[kind]]}
            done = subprocess.run(
                [tools.python, str(ADMISSION)], input=json.dumps(asked), capture_output=True, text=True,
                env=tools.environment(), check=True,
            )  # fmt: skip
            assert json.loads(done.stdout) == [[] for _ in seen[kind]]
    assert schemas.keys() & seen.keys()


def _closed(schema: Any) -> Any:
    """Return a schema that refuses keys that it does not know, where an API server would drop them."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        closed["additionalProperties"] = False
    return closed
