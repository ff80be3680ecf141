"""What values must not be is refused before anything is rendered, and the text says which and why."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.helm.rendering import Refused, Renderer

TRITON = {"url": "triton://gpu:8001"}

BY_SCHEMA: list[tuple[dict[str, Any], list[str]]] = [
    ({"replicas": 3}, ["replicas", "not allowed"]),
    ({"mode": "gatewy"}, ["mode", "gateway", "sidecar"]),
    ({"image": {"tags": "1"}}, ["image", "tags", "not allowed"]),
    ({"image": {"digest": "sha256:12"}}, ["image", "digest", "pattern"]),
    ({"replicaCount": "3"}, ["replicaCount", "integer"]),
    ({"backends": [{"id": "gpu-0", "uri": "triton://gpu:8001"}]}, ["backends", "uri", "not allowed"]),
    ({"backends": [{**TRITON, "engine": {"dtype": "fp8"}}]}, ["engine", "dtype", "float16", "bfloat16"]),
    ({"backends": [{**TRITON, "engine": {"rank_max": 0}}]}, ["engine", "rank_max", "1"]),
    ({"backends": [{**TRITON, "weights_transport": "rdma"}]}, ["weights_transport", "shared_memory"]),
    ({"store": {"memory_byte": 1}}, ["store", "memory_byte", "not allowed"]),
    ({"store": {"memory_bytes": "8Gi"}}, ["store", "memory_bytes", "integer"]),
    ({"queue": {"classes": {"chat": {"patience": 1}}}}, ["queue", "patience", "not allowed"]),
    ({"config": {"backends": [TRITON]}}, ["config", "backends", "not allowed"]),
    ({"config": {"listeners": {"data": {"address": "0.0.0.0:1"}}}}, ["config", "listeners", "address", "not allowed"]),
    ({"config": {"drain_timeout_s": -1}}, ["config", "drain_timeout_s", "0"]),
    ({"adapters": [{"name": "sql"}]}, ["adapters", "source"]),
    ({"adapters": [{"name": "base", "source": "s3://l/b"}]}, ["adapters", "name"]),
    ({"adapters": [{"name": "sql", "source": "s3://l/sql", "digest": "abc"}]}, ["adapters", "digest", "pattern"]),
    ({"declared": {"label": "no selector"}}, ["declared", "label", "pattern"]),
    ({"redis": {"url": "http://redis"}}, ["redis", "url", "pattern"]),
    ({"tls": {"http": {"secretName": "a", "clientCa": True}}}, ["tls", "http", "clientCa", "not allowed"]),
    ({"persistence": {"size": "lots"}}, ["persistence", "size", "pattern"]),
    ({"service": {"type": "ExternalName"}}, ["service", "type", "ClusterIP"]),
    ({"networkPolicy": {"client": []}}, ["networkPolicy", "client", "not allowed"]),
    ({"monitoring": {"rules": {"disabled": ["Watchdog"]}}}, ["monitoring", "disabled", "pattern"]),
    ({"sidecar": {"kind": "trtllm"}}, ["sidecar", "kind", "triton", "vllm", "sglang"]),
    ({"podSecurity": {"user": 0}}, ["podSecurity", "user", "1"]),
    ({"inferencePool": {"targetPorts": [8000, 8000]}}, ["inferencePool", "targetPorts"]),
    ({"inferencePool": {"targetPorts": list(range(8000, 8009))}}, ["inferencePool", "targetPorts", "8"]),
    ({"inferencePool": {"appProtocol": "grpc"}}, ["inferencePool", "appProtocol", "kubernetes.io/h2c"]),
    ({"config": {"listeners": {"endpoint_picker": {"tls": {}}}}}, ["endpoint_picker", "tls", "not allowed"]),
]
POOL: dict[str, Any] = {
    "inferencePool": {"create": True, "matchLabels": {"app": "vllm"}},
    "networkPolicy": {"gateways": [{"podSelector": {}}]},
}
PICKER: dict[str, Any] = {"tls": {"picker": {"secretName": "picker-tls"}}}
SLICES = {"service": "vllm", "port": 8000, "namespace": "models"}


def picker_at(address: str) -> dict[str, Any]:
    return {"config": {"listeners": {"endpoint_picker": {"address": address}}}}


BY_CHART: list[tuple[dict[str, Any], str]] = [
    ({"replicaCount": 2}, "several replicas know of each other by a Redis: set redis.url"),
    ({"autoscaling": {"enabled": True}}, "set redis.url, or redis.bundled.enabled for a trial"),
    ({"redis": {"url": "redis://r:6379/0", "bundled": {"enabled": True}}}, "take one out"),
    ({"redis": {"url": "redis://r:6379/0", "tlsSecret": "ca"}}, "let it begin with rediss"),
    ({"tls": {"replicas": {"secretName": "a"}}}, "set redis.url"),
    ({"admin": {"tokenSecret": {"name": "a"}}}, "or set admin.allowCleartext: true where the network encrypts"),
    ({"tls": {"data": {"clientCa": True}}}, "the Secret with tls.crt, tls.key and ca.crt"),
    ({"engineScaling": {"enabled": True}}, "engineScaling.target.name, the Deployment of the engines"),
    (
        {"engineScaling": {"enabled": True, "target": {"name": "t"}, "minReplicas": 4, "maxReplicas": 2}},
        "engineScaling.maxReplicas (2) is below engineScaling.minReplicas (4)",
    ),
    (
        {"autoscaling": {"enabled": True, "minReplicas": 9}, "redis": {"bundled": {"enabled": True}}},
        "autoscaling.maxReplicas (6) is below autoscaling.minReplicas (9)",
    ),
    ({"sidecar": {"engine": {"enabled": True, "image": "e"}}}, "set mode: sidecar, or name the engines under backends"),
    (
        {"mode": "sidecar", "sidecar": {"engine": {"enabled": True}}},
        "sidecar.engine.enabled needs sidecar.engine.image",
    ),
    ({"mode": "sidecar", "persistence": {"enabled": True}}, "one sidecar in each engine's pod"),
    ({"backends": []}, "backends is empty, so the gateway would have no engine to send requests to: name the engines"),
    ({"adapters": [{"name": "a", "source": "/a"}, {"name": "a", "source": "/b"}]}, "adapters: a is declared twice"),
    (PICKER, "there is no endpoint picker: set inferencePool.create"),
    ({"envoy": {"enabled": True}, **picker_at("unix:/tmp/p")}, "is a socket file: take it out, or name HOST:PORT"),
    ({"envoy": {"enabled": True}, "tls": {"http": {"secretName": "a"}}}, "set envoy.allowCleartext: true"),
    ({**POOL, "mode": "sidecar"}, "which no gateway reaches: set mode: gateway"),
    ({"inferencePool": {"create": True}}, "needs inferencePool.matchLabels"),
    ({"inferencePool": POOL["inferencePool"]}, "networkPolicy.gateways is empty, so no gateway would reach"),
    ({**POOL, **picker_at("127.0.0.1:9004")}, "is 127.0.0.1:9004, which no gateway reaches: take it out"),
    ({**POOL, **picker_at("[::1]:9004")}, "is [::1]:9004, which no gateway reaches: take it out"),
    (
        {**POOL, "backends": [{"id": "v", "kind": "vllm", "discover": {"endpoint_slices": SLICES}}]},
        "an InferencePool has pods of its own namespace only",
    ),
    ({**POOL, "istio": {"destinationRule": {"create": True}}}, "set inferencePool.create and tls.picker.secretName"),
    ({**POOL, **PICKER, "istio": {"destinationRule": {"create": True}}}, "needs one way to know the endpoint picker"),
    (
        {
            **POOL,
            **PICKER,
            "istio": {"destinationRule": {"create": True, "credentialName": "a", "insecureSkipVerify": True}},
        },
        "needs one way to know the endpoint picker",
    ),
    ({"resources": {"limits": {"memory": "2 Gigs"}}}, '"2 Gigs" is not an amount of memory: write 2Gi, 512Mi or bytes'),
]


@pytest.mark.parametrize(
    ("values", "said"), BY_SCHEMA, ids=lambda part: "-".join(part) if isinstance(part, list) else ""
)
def test_schema(helm: Renderer, values: dict[str, Any], said: list[str]) -> None:
    """An unknown key or a wrong value is named, with what it may be."""
    with pytest.raises(Refused) as refused:
        helm.objects(values)
    text = str(refused.value)
    assert "values don't meet the specifications of the schema" in text
    missing = [word for word in said if word.lower() not in text.lower()]
    if missing == ["pattern"]:  # as the other Helm says it
        missing = [] if "does not match" in text.lower() else missing
    assert not missing, text


@pytest.mark.parametrize(("values", "said"), BY_CHART, ids=lambda part: part if isinstance(part, str) else "")
def test_contradictions(helm: Renderer, values: dict[str, Any], said: str) -> None:
    """Values that do not go together are refused with the way out."""
    with pytest.raises(Refused) as refused:
        helm.objects(values)
    assert said in str(refused.value).replace("\\n", "\n").replace('\\"', '"')
