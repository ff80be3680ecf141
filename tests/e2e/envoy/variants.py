"""Envoy as gateways configure it, as changes of the bootstrap that `sidecar envoy config` prints.

Read in istio/istio 86c9f01 (`InferencePoolExtProc` in pilot/pkg/xds/filters/filters.go, core/route/route.go,
`applyOverrideHostPolicy` in core/cluster_builder.go) and envoyproxy/ai-gateway c217da8
(internal/extensionserver/inferencepool.go, post_cluster_modify.go). agentgateway is no Envoy: its are the modes and
what it does not send, over a cluster that goes where the header says. None of them tells the sidecar by an access log.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

from sidecar.fronts.extproc.bootstrap import TYPE

Change = Callable[[dict[str, Any]], None]
FD = "FULL_DUPLEX_STREAMED"


def plain(engines: Sequence[str]) -> Change:
    """Envoy alone: no external processor, no access log, a cluster of the engines."""

    def change(record: dict[str, Any]) -> None:
        manager = manager_of(record)
        del manager["access_log"], manager["http_filters"][0], manager["route_config"]["virtual_hosts"][0]["routes"][0]
        record["static_resources"]["clusters"][:] = [_static(engines)]

    return change


def istio(engines: Sequence[str]) -> Change:
    """A filter that a route turns on, full duplex both ways, and a cluster of the pool's endpoints that our metadata
    overrides; a failure mode FailClose.
    """

    def change(record: dict[str, Any]) -> None:
        del manager_of(record)["access_log"]
        asks = {"envoy_grpc": {"cluster_name": "sidecar"}}
        manager_of(record)["http_filters"][0]["typed_config"] = {
            "@type": f"{TYPE}filters.http.ext_proc.v3.ExternalProcessor",
            "grpc_service": {"envoy_grpc": {"cluster_name": "dummy"}, "timeout": "10s"},
            "failure_mode_allow": True,
            "processing_mode": {"request_header_mode": "SKIP", "response_header_mode": "SKIP"},
            "message_timeout": "1000s",
            "metadata_options": {
                "receiving_namespaces": {"untyped": ["envoy.lb"]},
                "forwarding_namespaces": {"untyped": ["envoy.lb"]},
            },
        }
        overrides = {"failure_mode_allow": False, "grpc_service": asks, "processing_mode": _modes(FD)}
        for route in manager_of(record)["route_config"]["virtual_hosts"][0]["routes"]:
            route["typed_per_filter_config"] = {
                "envoy.filters.http.ext_proc": {
                    "@type": f"{TYPE}filters.http.ext_proc.v3.ExtProcPerRoute",
                    "overrides": overrides,
                }
            }
        clusters = record["static_resources"]["clusters"]
        dummy = {"name": "dummy", "load_assignment": {"cluster_name": "dummy"}}
        clusters[:] = [
            _static(engines) | override_host(),
            {**_static(engines), "name": "engines_h2"},
            dummy,
            clusters[-1],
        ]

    return change


def ai_gateway(record: dict[str, Any]) -> None:
    """Its annotations `processing-body-mode: buffered` and `allow-mode-override: true`."""
    del manager_of(record)["access_log"]
    processor_of(record).clear()
    processor_of(record).update(
        {
            "@type": f"{TYPE}filters.http.ext_proc.v3.ExternalProcessor",
            "grpc_service": {"envoy_grpc": {"cluster_name": "sidecar"}},
            "processing_mode": _modes("BUFFERED"),
            "allow_mode_override": True,
            "message_timeout": "300s",
            "failure_mode_allow": False,
        }
    )


def agentgateway(record: dict[str, Any]) -> None:
    """Full duplex both ways, without attributes and without metadata that come back."""
    del manager_of(record)["access_log"]
    processor = processor_of(record)
    for key in ("response_attributes", "metadata_options"):
        del processor[key]
    processor["processing_mode"] = _modes(FD)


def add_server(record: dict[str, Any], name: str, address: str) -> None:
    """Add a cluster as the picker's, of the gRPC server at HOST:PORT."""
    clusters = record["static_resources"]["clusters"]
    cluster = deepcopy(next(each for each in clusters if each["name"] == "sidecar"))
    cluster["name"] = cluster["load_assignment"]["cluster_name"] = name
    host, _, port = address.rpartition(":")
    place = {"socket_address": {"address": host, "port_value": int(port)}}
    cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [{"endpoint": {"address": place}}]
    clusters.append(cluster)


def override_host() -> dict[str, Any]:
    """Return a balancing policy that takes the endpoint out of our metadata, and else goes round."""
    key = {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}
    served = {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint-served"}]}
    policies = "type.googleapis.com/envoy.extensions.load_balancing_policies."
    fallback = {
        "name": "envoy.load_balancing_policies.round_robin",
        "typed_config": {"@type": f"{policies}round_robin.v3.RoundRobin"},
    }
    chosen = {
        "name": "envoy.load_balancing_policies.override_host",
        "typed_config": {
            "@type": f"{policies}override_host.v3.OverrideHost",
            "override_host_sources": [{"metadata": key}],
            "selected_host_key": served,
            "fallback_policy": {"policies": [{"typed_extension_config": fallback}]},
        },
    }
    return {"load_balancing_policy": {"policies": [{"typed_extension_config": chosen}]}}


def astray(record: dict[str, Any], address: str) -> None:
    """Have Envoy send all requests to one engine, whatever the picker says."""
    clusters = record["static_resources"]["clusters"]
    clusters[:] = [_static([address]), *(cluster for cluster in clusters if cluster["name"] != "engines")]


def manager_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the connection manager of a bootstrap."""
    found: dict[str, Any] = record["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    return found


def processor_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the filter that asks the sidecar."""
    found: dict[str, Any] = manager_of(record)["http_filters"][0]["typed_config"]
    return found


def _static(engines: Sequence[str]) -> dict[str, Any]:
    places = [address.rpartition(":") for address in engines]
    ends = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        for host, _, port in places
    ]
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), 1 << 16)
    return {
        "name": "engines",
        "type": "STATIC",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {"cluster_name": "engines", "endpoints": [{"lb_endpoints": ends}]},
    }


def _modes(of_bodies: str) -> dict[str, str]:
    return {
        "request_header_mode": "SEND",
        "request_body_mode": of_bodies,
        "request_trailer_mode": "SEND",
        "response_header_mode": "SEND",
        "response_body_mode": of_bodies,
        "response_trailer_mode": "SEND",
    }
