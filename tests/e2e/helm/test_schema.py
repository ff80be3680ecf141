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
    ({"sidecar": {"kind": "sglang"}}, ["sidecar", "kind", "triton", "vllm"]),
    ({"podSecurity": {"user": 0}}, ["podSecurity", "user", "1"]),
]
BY_CHART: list[tuple[dict[str, Any], str]] = [
    ({"replicaCount": 2}, "several replicas know of each other by a Redis: set redis.url"),
    ({"autoscaling": {"enabled": True}}, "set redis.url, or redis.bundled.enabled for a trial"),
    ({"redis": {"url": "redis://r:6379/0", "bundled": {"enabled": True}}}, "take one out"),
    ({"redis": {"url": "redis://r:6379/0", "tlsSecret": "ca"}}, "let it begin with rediss"),
    ({"tls": {"replicas": {"secretName": "a"}}}, "set redis.url"),
    ({"redis": {"bundled": {"transition": True}}}, "without redis.bundled.enabled"),
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
