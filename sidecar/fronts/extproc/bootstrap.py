"""Write Envoy's configuration for the Envoy lane: one listener, whose every request asks the sidecar first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sidecar.fronts.extproc.call_exchange import STREAM, UNARY
from sidecar.fronts.extproc.heads import DETAILS, SOURCE, SUBSET_HINT, UPSTREAM
from sidecar.fronts.extproc.replies import DESTINATION, ENDPOINTS, EXCHANGE, OURS
from sidecar.proto import envoy_pb2 as envoy

PROCESSOR_FILTER = "envoy.filters.http.ext_proc"
TYPE = "type.googleapis.com/envoy.extensions."
HELD_MAX = 65_536
"""Requests that Envoy holds or sends at a time: more than a sidecar admits, whose own limits tell a client why."""
FRAMES_MAX = 1 << 20
"""Frames that wait for one connection: a request has about three."""
HOLD_S = 3600
"""Envoy's time for an answer of ours, the longest that it takes. In full duplex a hold does not count."""
HEALTH_CHECK: dict[str, Any] = {
    "timeout": "2s",
    "interval": "1s",
    "no_traffic_interval": "1s",
    "no_traffic_healthy_interval": "1s",
    "unhealthy_threshold": 2,
    "healthy_threshold": 1,
    "grpc_health_check": {},
}
"""Leaves a replica out two seconds after its end; one that drains says so itself."""


def bootstrap(
    port: int,
    pickers: Sequence[str],
    request_mode: str = "FULL_DUPLEX_STREAMED",
    response_mode: str = "STREAMED",
    picker_ca: str | None = None,
    admin_port: int | None = None,
    host: str = "0.0.0.0",
    ready_port: int | None = None,
    data: Sequence[str] = (),
    data_calls_max: int = 128,
    calls_max: int = 4096,
    carries_calls: bool = False,
) -> dict[str, Any]:
    """Return the bootstrap of an Envoy that listens on `port` and reaches the endpoint pickers at `pickers`, HOST:PORT
    of each replica, with `calls_max` calls on a connection.

    `picker_ca` is the path, on Envoy's machine, of the certificate by which it knows a picker with TLS. `ready_port`
    has another listener tell from outside whether Envoy is ready and alive, and needs `admin_port`. gRPC calls go to
    the replicas' data listeners at `data`, in path, with `data_calls_max` calls on a connection; with `carries_calls`
    the pickers are asked about KServe's inference, and without `data` about all calls.
    """
    clusters = _engines()
    if data:
        clusters = clusters if carries_calls else clusters[:1]
        clusters.append(_server("sidecar_data", data, data_calls_max))
    clusters.append(_server("sidecar", pickers, calls_max, picker_ca))
    configured: dict[str, Any] = {
        "static_resources": {
            "listeners": [_listener(host, port, request_mode, response_mode, _routes(bool(data), carries_calls))],
            "clusters": clusters,
        }
    }
    if admin_port is not None:
        configured["admin"] = {"address": _socket("127.0.0.1", admin_port)}
        if ready_port is not None:
            configured["static_resources"]["listeners"].append(_ready(host, ready_port))
            configured["static_resources"]["clusters"].append(_cluster("admin", "STATIC", ("127.0.0.1", admin_port)))
    return configured


def _routes(has_data: bool, carries_calls: bool) -> list[dict[str, Any]]:
    """Return the routes of calls, and that of all other requests."""

    def route(match: dict[str, Any], cluster: str) -> dict[str, Any]:
        return {"match": match, "route": {"cluster": cluster, "timeout": "0s"}}

    any_path = {"prefix": "/"}
    others = route(any_path, "engines")
    if not has_data:
        return [route(any_path | {"grpc": {}}, "engines_h2"), others]
    off = {"@type": f"{TYPE}filters.http.ext_proc.v3.ExtProcPerRoute", "disabled": True}
    in_path = route(any_path | {"grpc": {}}, "sidecar_data") | {"typed_per_filter_config": {PROCESSOR_FILTER: off}}
    asked = [route({"path": path, "grpc": {}}, "engines_h2") for path in (UNARY, STREAM)] if carries_calls else []
    return [*asked, in_path, others]


def _listener(
    host: str, port: int, request_mode: str, response_mode: str, routes: list[dict[str, Any]]
) -> dict[str, Any]:
    manager = {
        "@type": f"{TYPE}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "clients",
        "stream_idle_timeout": "0s",  # it counts while a request is held
        "access_log_options": {"access_log_flush_interval": "1s"},
        "access_log": [_access_log("0.01s", ends=True), _access_log("0.25s", ends=False)],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [
            {"name": PROCESSOR_FILTER, "typed_config": external_processor(request_mode, response_mode)},
            _router(),
        ],
    }
    return _listening("clients", host, port, manager)


def _ready(host: str, port: int) -> dict[str, Any]:
    """Return a listener for probes: /ready asks the administration, which stays on loopback; /live a worker thread.

    Once its health check is failed on purpose, as before its end, an Envoy is not ready and yet alive.
    """
    routes = [
        {"match": {"path": "/ready"}, "route": {"cluster": "admin"}},
        {"match": {"path": "/live"}, "direct_response": {"status": 200}},
    ]
    manager = {
        "@type": f"{TYPE}filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ready",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [_router()],
    }
    return _listening("ready", host, port, manager)


def _listening(name: str, host: str, port: int, manager: dict[str, Any]) -> dict[str, Any]:
    manager_filter = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    return {"name": name, "address": _socket(host, port), "filter_chains": [{"filters": [manager_filter]}]}


def _router() -> dict[str, Any]:
    return {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{TYPE}filters.http.router.v3.Router"}}


def external_processor(request_mode: str, response_mode: str) -> dict[str, Any]:
    """Return the filter that asks the sidecar. Modes are Envoy's names of body modes."""
    is_buffered = request_mode == envoy.BodyMode.Name(envoy.BUFFERED)
    return {
        "@type": f"{TYPE}filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "sidecar"}},
        "failure_mode_allow": False,  # open, it would send requests unchanged to any engine
        "status_on_error": {"code": 503},
        "message_timeout": f"{HOLD_S}s",
        "request_attributes": [SOURCE],
        "response_attributes": [UPSTREAM, DETAILS],
        "processing_mode": {
            "request_body_mode": request_mode,
            "request_trailer_mode": "SKIP" if is_buffered else "SEND",
            "response_body_mode": response_mode,
            "response_trailer_mode": "SEND",
        },
        "allow_mode_override": is_buffered,
        "mutation_rules": {"allow_envoy": True},  # for the timeout by which Envoy keeps a client's deadline
        "metadata_options": {
            "receiving_namespaces": {"untyped": [ENDPOINTS, OURS]},
            "forwarding_namespaces": {"untyped": [ENDPOINTS, SUBSET_HINT]},
        },
    }


def _access_log(flush_interval: str, ends: bool) -> dict[str, Any]:
    """Return the log of the ends of answers, or of how far they are.

    There are two, since an end frees a seat and is sent soon, and of the others many are to come in one message.
    """
    about_ours = {"matcher": {"filter": OURS, "path": [{"key": EXCHANGE}], "value": {"present_match": True}}}
    of_type = {"types": ["DownstreamPeriodic"], "exclude": ends}
    both = [{"metadata_filter": {**about_ours, "match_if_key_not_found": False}}, {"log_type_filter": of_type}]
    common = {
        "log_name": "lora-sidecar",
        "transport_api_version": "V3",
        "buffer_flush_interval": flush_interval,
        "buffer_size_bytes": 256 << 10,
        "grpc_service": {"envoy_grpc": {"cluster_name": "sidecar"}},
    }
    return {
        "name": "envoy.access_loggers.http_grpc",
        "filter": {"and_filter": {"filters": both}},
        "typed_config": {
            "@type": f"{TYPE}access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
            "additional_response_trailers_to_log": ["grpc-status"],
            "common_config": common,
        },
    }


def _engines() -> list[dict[str, Any]]:
    """Return the clusters of engines, whose addresses are those that the sidecar answers."""
    plain = {
        "name": "engines",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": DESTINATION},
        "circuit_breakers": _breakers(),
    }
    return [plain, {**plain, "name": "engines_h2", "typed_extension_protocol_options": _http2(HELD_MAX)}]


def _server(name: str, addresses: Sequence[str], calls_max: int, ca: str | None = None) -> dict[str, Any]:
    """Return the cluster of a gRPC server's replicas, with so many calls on a connection.

    Of several, those that are not well get no new calls, unless none is well.
    """
    places = [(host.strip("[]"), int(port)) for host, _, port in (address.rpartition(":") for address in addresses)]
    names = [host for host, _ in places if not host.replace(".", "").isdigit() and ":" not in host]
    cluster = _cluster(name, "STRICT_DNS" if names else "STATIC", *places)
    cluster |= {"circuit_breakers": _breakers(), "typed_extension_protocol_options": _http2(calls_max)}
    if len(places) > 1:
        cluster |= {"health_checks": [HEALTH_CHECK], "common_lb_config": {"healthy_panic_threshold": {"value": 1}}}
    if ca is not None:
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": f"{TYPE}transport_sockets.tls.v3.UpstreamTlsContext",
                **({"sni": names[0]} if len(names) == 1 else {}),  # addresses are none
                "common_tls_context": {
                    "alpn_protocols": ["h2"],
                    "validation_context": {"trusted_ca": {"filename": ca}},
                },
            },
        }
    return cluster


def _cluster(name: str, kind: str, *places: tuple[str, int]) -> dict[str, Any]:
    endpoints = [{"endpoint": {"address": _socket(host, port)}} for host, port in places]
    return {
        "name": name,
        "type": kind,
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
    }


def _http2(calls_max: int) -> dict[str, Any]:
    """Return options of HTTP/2 by which many requests may begin or leave at once.

    By default Envoy takes 10,000 frames that wait for one connection, or 1,000 resets, for a flood: it closes the
    connection, and with it all that is held there.
    """
    limits = {
        "max_concurrent_streams": calls_max,
        "max_outbound_frames": FRAMES_MAX,
        "max_outbound_control_frames": FRAMES_MAX,
    }
    return {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": f"{TYPE}upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": limits},
        }
    }


def _breakers() -> dict[str, Any]:
    """Return limits beyond ours: Envoy's own default of 1,024 would refuse requests that wait."""
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests"), HELD_MAX)
    return {"thresholds": [limits]}


def _socket(host: str, port: int) -> dict[str, Any]:
    address = {"address": host, "port_value": port}
    return {"socket_address": address | ({"ipv4_compat": True} if host == "::" else {})}
