"""Values in which every two choices of different options meet at least once.

Most mistakes of a template need one option or two that meet, so this finds nearly what all combinations would, with
some thirty renderings instead of millions.
"""

from __future__ import annotations

from copy import deepcopy
from itertools import combinations
from typing import Any

TRITON = {"url": "triton://triton.models.svc:8001", "metrics": "http://triton.models.svc:8002/metrics"}
REDIS = {"url": "rediss://redis.infra.svc:6379/0", "tlsSecret": "redis-ca", "passwordSecret": {"name": "redis"}}
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
ISSUER = {
    "issuer": "https://kubernetes.default.svc.cluster.local",
    "audience": "lora-sidecar",
    "jwks": "https://kubernetes.default.svc/openid/v1/jwks",
    "jwks_ca": f"{ACCOUNT}/ca.crt",
    "jwks_token_file": f"{ACCOUNT}/token",
    "tenant_pattern": "system:serviceaccount:{tenant}:*",
}
OFF: dict[str, Any] = {}

Options = dict[str, list[dict[str, Any]]]
OPTIONS: Options = {
    "identity": [
        OFF,
        {"identity": {"mode": "observe", "existingSecret": "api-keys"}},
        {"identity": {"mode": False}},
        {"config": {"identity": {"keys": False, "issuers": [ISSUER]}}},
    ],
    "replicas": [
        OFF,
        {"replicaCount": 3, "redis": {"bundled": {"enabled": True}}, "identity": {"mode": "observe"}},
        {
            "autoscaling": {"enabled": True, "openStreams": {"target": 100}},
            "redis": REDIS,
            "tls": {"replicas": {"secretName": "replicas-tls"}},
        },
    ],
    "disk": [OFF, {"persistence": {"enabled": True}}],
    "backends": [
        {"backends": [TRITON]},
        {"backends": [TRITON, {**TRITON, "id": "second", "base_model": {"name": "m", "aliases": ["n"]}}]},
        OFF,
    ],
    "data": [
        OFF,
        {"tls": {"data": {"secretName": "data-tls"}}},
        {"tls": {"data": {"secretName": "data-tls", "clientCa": True}}, "config": {"tenant_from": "certificate"}},
    ],
    "http": [OFF, {"tls": {"http": {"secretName": "http-tls"}}}],
    "admin": [
        OFF,
        {"admin": {"tokenSecret": {"name": "token"}}, "tls": {"admin": {"secretName": "admin-tls"}}},
        {"admin": {"tokenSecret": {"name": "token"}, "allowCleartext": True}},
        {"tls": {"admin": {"secretName": "admin-tls", "clientCa": True}}},
    ],
    "declared": [
        OFF,
        {"adapters": [{"name": "sql", "source": "s3://loras/sql"}]},
        {"declared": {"customResources": True}},
    ],
    "policy": [
        OFF,
        {"networkPolicy": {"enabled": False}},
        {
            "networkPolicy": {
                "operators": [{"podSelector": {"matchLabels": {"role": "operator"}}}],
                "egress": [{"to": [{"namespaceSelector": {}}], "ports": [{"port": 8001}]}],
            }
        },
    ],
    "monitoring": [
        OFF,
        {
            "monitoring": {
                "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
                "rules": {"enabled": True},
                "dashboard": {"enabled": True},
            }
        },
    ],
    "account": [
        OFF,
        {
            "serviceAccount": {"create": False, "name": "own"},
            "rbac": {"create": False},
            "identity": {"mode": "observe", "existingSecret": "api-keys"},
            "config": {"identity": {"keys": True}},
        },
    ],
    "scheduling": [
        OFF,
        {
            "priorityClass": {"create": True, "value": 5000},
            "nodeSelector": {"pool": "cpu"},
            "tolerations": [{"key": "dedicated", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "imagePullSecrets": [{"name": "registry"}],
            "podDisruptionBudget": {"maxUnavailable": "50%"},
        },
        {"spread": {"topologyKeys": []}, "podDisruptionBudget": {"enabled": False}},
    ],
    "pod": [
        OFF,
        {
            "ipv6": True,
            "podLabels": {"team": "llm"},
            "podAnnotations": {"note": "yes"},
            "commonLabels": {"cost": "a"},
            "env": [{"name": "AWS_REGION", "value": "eu-west-1"}],
            "envFrom": [{"secretRef": {"name": "s3"}}],
            "secretMounts": [{"name": "keys", "secretName": "keys"}],
            "image": {"digest": f"sha256:{'0' * 64}", "pullPolicy": "Always"},
            "config": {"drain_timeout_s": 60, "adapter_labels_max": 10},
            "service": {"type": "LoadBalancer", "annotations": {"lb": "internal"}},
        },
    ],
    "envoy": [OFF, {"envoy": {"enabled": True, "allowCleartext": True, "extraArgs": ["--log-level", "warn"]}}],
    "pool": [
        OFF,
        {
            "inferencePool": {"create": True, "matchLabels": {"app": "vllm"}, "targetPorts": [8000, 8001]},
            "networkPolicy": {"gateways": [{"podSelector": {"matchLabels": {"role": "gateway"}}}]},
        },
        {
            "inferencePool": {"create": True, "matchLabels": {"app": "t"}, "appProtocol": "kubernetes.io/h2c"},
            "networkPolicy": {"gateways": [{"namespaceSelector": {}}]},
            "tls": {"picker": {"secretName": "picker-tls"}},
            "istio": {"destinationRule": {"create": True, "insecureSkipVerify": True}},
        },
    ],
    "engines": [OFF, {"engineScaling": {"enabled": True, "target": {"name": "triton"}}}],
}
ENGINE = {
    "enabled": True,
    "image": "engine:1",
    "resources": {"requests": {"cpu": "4", "memory": "8Gi"}, "limits": {"memory": "8Gi", "nvidia.com/gpu": 1}},
}
OF_GATEWAYS = ("replicas", "disk", "pool")
SIDECARS: list[dict[str, Any]] = [
    {"mode": "sidecar", "sidecar": {"engine": ENGINE}},
    {"mode": "sidecar", "sidecar": {"kind": "vllm", "engine": ENGINE}},
    {"mode": "sidecar"},
]
MODES: dict[str, Options] = {
    "gateway": OPTIONS,
    "sidecar": {"mode": SIDECARS, **{name: choices for name, choices in OPTIONS.items() if name not in OF_GATEWAYS}},
}


def cases() -> dict[str, dict[str, Any]]:
    """Return values by name, gateways and sidecars."""
    return {
        f"{mode}-{number}": _merged([choices[row[name]] for name, choices in options.items()])
        for mode, options in MODES.items()
        for number, row in enumerate(pairwise(options))
    }


def pairwise(options: Options) -> list[dict[str, int]]:
    """Return rows of choices that cover every pair: greedily, each row taking what leaves the fewest pairs."""
    names = list(options)
    left = {
        (first, one, second, other)
        for first, second in combinations(names, 2)
        for one in range(len(options[first]))
        for other in range(len(options[second]))
    }
    rows = []
    while left:
        row: dict[str, int] = {}
        first, one, second, other = min(left)
        row |= {first: one, second: other}
        for name in names:
            if name not in row:
                row[name] = max(range(len(options[name])), key=lambda choice: (_gain(left, row, name, choice), -choice))
        left -= {(a, row[a], b, row[b]) for a, b in combinations(names, 2)}
        rows.append(row)
    return rows


def _gain(left: set[tuple[str, int, str, int]], row: dict[str, int], name: str, choice: int) -> int:
    """Return how many pairs that no row has yet this choice would bring."""
    pairs = ((name, choice, other, taken) for other, taken in row.items())
    return sum(pair in left or (pair[2], pair[3], pair[0], pair[1]) in left for pair in pairs)


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in parts:
        _merge(whole, part)
    return whole


def _merge(into: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = deepcopy(value)
