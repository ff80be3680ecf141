"""The listeners of one process: for clients, operators, HTTP, probes, other replicas, and draining."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sidecar.access.access import Caller
from sidecar.access.operators import Operators
from sidecar.access.principal import Action, Presented, Purpose
from sidecar.backends.credentials import read_pem
from sidecar.config import Config
from sidecar.config.backends import Backend as Entry
from sidecar.config.listeners import GrpcListener, Listener, is_local
from sidecar.config.queue import Queue
from sidecar.config.section import Tls
from sidecar.errors import Misused, Reason
from sidecar.fronts.admin.configuration import Changes
from sidecar.fronts.admin.front import add_admin
from sidecar.fronts.admin.guard import Guard
from sidecar.fronts.admin.verbs import purpose_on_admin
from sidecar.fronts.calls import SERVER_CALLS_OPTIONS, BoundedCalls, connection_calls_options, purpose_on_data
from sidecar.fronts.checked_messages import CheckedMessages
from sidecar.fronts.extproc.front import HEALTH_NAMES, MESSAGE_BYTES_MAX, Picker
from sidecar.fronts.generate.front import GatewayService
from sidecar.fronts.hiding import Hiding
from sidecar.fronts.http.app import HttpFront, server_tls
from sidecar.fronts.http.connection import HttpLimits
from sidecar.fronts.http.drain import HttpDrain
from sidecar.fronts.http.pages import without_pages
from sidecar.fronts.http.probes import HttpProbes, Probes
from sidecar.fronts.intake import Intake, IntakeLimits
from sidecar.fronts.kserve.front import add_kserve, add_kserve_admin
from sidecar.fronts.kserve.infer import KServe
from sidecar.fronts.kserve.lifetime import Lifetimes, connection_age_options
from sidecar.fronts.kserve.verbs import SERVICE as KSERVE
from sidecar.fronts.openai.candidates import served_paths
from sidecar.fronts.openai.chat_templates import ChatTemplate, read_chat_template
from sidecar.fronts.openai.description import description_of
from sidecar.fronts.openai.front import OpenAiFront
from sidecar.fronts.openai.load_calls import LoadCalls
from sidecar.proto import admin_pb2, gateway_pb2, gateway_pb2_grpc
from sidecar.replicas.replica import Replica
from sidecar.serve.access_parts import AccessParts
from sidecar.shell.gateway import Gateway
from sidecar.shell.metrics import ArrivalFigures, Metrics

SERVER_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # No compression: 64 KB could become 64 MB before any of our limits applies.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    *SERVER_CALLS_OPTIONS,
)
CALLS_OF_REPLICA_MAX = 128
"""Calls of one connection between replicas: one carries all requests that are forwarded."""


class Listening:
    """The listeners of a gateway. Addresses are HOST:PORT, known once it is `open`."""

    def __init__(
        self,
        config: Config,
        entries: Sequence[Entry],
        gateway: Gateway,
        metrics: Metrics,
        drain: Callable[[], Awaitable[None]],
        access: AccessParts,
    ) -> None:
        self.data = self.admin = self.http = self.probes = self.drain = self.endpoint_picker = ""
        self.streams: Lifetimes | None = None
        """Lifetimes of clients' KServe streams."""
        self.drained = asyncio.Event()
        """Set once a caller of the drain listener has been told that nothing runs any more."""
        self.loads = LoadCalls(gateway, config) if config.openai.load_calls else None
        self.changes: Changes | None = None
        """Changes the configuration for operators, once it is set."""
        self._config = config
        self._entries = entries
        self._gateway = gateway
        self._metrics = metrics
        self._drain = drain
        self._access = access
        self._servers: list[grpc.aio.Server] = []
        limits = config.listeners
        self.intake = Intake(IntakeLimits(limits.arriving_bytes_max, limits.arrival_s, limits.data.message_bytes_max))
        metrics.arrivals = lambda: ArrivalFigures(self.intake.held_bytes, self.intake.refused)
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._http: HttpFront | None = None
        self._openai: OpenAiFront | None = None
        self._probes: HttpProbes | None = None
        self._drain_front: HttpDrain | None = None
        self._picker: Picker | None = None

    def server(self, listener: Listener, name: str, interceptors: Sequence[Any] = ()) -> tuple[grpc.aio.Server, str]:
        """Return another server, which is started with the others, and its address. Raises Misused(PORT_IN_USE)."""
        server = self._server(interceptors, connection_calls_options(CALLS_OF_REPLICA_MAX))
        return server, _bind(server, listener, name)

    async def open(self, replica: Replica | None) -> None:
        """Listen. Raises Misused naming a listener whose address cannot be bound."""
        self._open_data()
        self._open_admin(replica)
        await self._open_http()
        await self._open_probes()
        await self._open_picker(replica)
        for server in self._servers:
            await server.start()
        await self._report(health_pb2.HealthCheckResponse.SERVING)

    def configure(self, queue: Queue, templates: Mapping[str, ChatTemplate]) -> None:
        """Take what changes of a configuration while the process runs."""
        if self._openai is not None:
            self._openai.configure(queue, templates)

    async def refuse(self) -> None:
        """Report NOT_SERVING to health checks."""
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def _report(self, status: Any) -> None:
        for name in ("", *HEALTH_NAMES):
            await self._health.set(name, status)

    async def close(self, grace_s: float = 0) -> None:
        """Stop listening; calls that are still open after `grace_s` are cancelled."""
        if self._drain_front is not None:
            await self._drain_front.stop()
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        if self._picker is not None:
            await self._picker.stop()
        for http in (self._http, self._probes):
            if http is not None:
                await http.stop()

    def _open_data(self) -> None:
        config, wanted = self._config, self._config.listeners.data
        hiding = Hiding(self._gateway, config.hide_backend)
        calls = self._calls(wanted, self._gateway.access.identify, purpose_on_data, hiding)
        options = (*_bounds(wanted, wanted.message_bytes_max), *connection_age_options(wanted.max_connection_age_s))
        data = self._server([calls, CheckedMessages()], options)
        service = GatewayService(self._gateway, config.hide_backend)
        gateway_pb2_grpc.add_GatewayServicer_to_server(service, data)
        self.streams = add_kserve(data, self._gateway, config).lifetimes
        health_pb2_grpc.add_HealthServicer_to_server(self._health, data)
        _reflect(data, gateway_pb2)
        self.data = _bind(data, wanted, "data", calls)

    def _open_admin(self, replica: Replica | None) -> None:
        wanted = self._config.listeners.admin
        tokens = None if wanted.token_file is None else Path(wanted.token_file)
        operators = Operators(self._gateway.access, tokens, self._config.identity.local_admin)
        calls = self._calls(wanted, operators.identify, purpose_on_admin)
        guard = Guard(self._gateway, self._access.store)
        admin = self._server([calls, CheckedMessages(), guard], _bounds(wanted, wanted.message_bytes_max))
        add_admin(admin, self._gateway, replica, self._access.calls, self.changes)
        add_kserve_admin(admin, self._gateway)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, admin)
        _reflect(admin, admin_pb2)
        self.admin = _bind(admin, wanted, "admin", calls)

    async def _open_http(self) -> None:
        http, drain = self._config.listeners.http, self._config.listeners.drain
        enforces = self._config.identity.mode == "enforce"
        any_host = http.tls is not None or self._config.listeners.endpoint_picker.in_path is not None
        templates = chat_templates(self._entries)
        described = lru_cache(maxsize=8)(partial(description_of, self._config))
        self._openai = OpenAiFront(self._gateway, self._config, templates, self.intake, self.loads)
        self._http = HttpFront(
            self._gateway,
            self._metrics,
            http.address,
            self.data,
            self._openai,
            HttpLimits(http.connections_max),
            _http_tls(http.tls, http.address),
            http.probes,
            not enforces and not self._config.hide_backend,
            lambda: described(served_paths(self._gateway.state)),
            http.cors_origins,
            lambda app: (
                app if enforces or not is_local(http.address) else without_pages(app, http.cors_origins, any_host)
            ),
        )
        await self._http.start()
        self.http = self._http.address
        if drain.address is not None:
            self._drain_front = HttpDrain(self._drain, self.drained.set, drain.address)
            await self._drain_front.start()
            self.drain = self._drain_front.address

    async def _open_picker(self, replica: Replica | None) -> None:
        wanted = self._config.listeners.endpoint_picker
        if wanted.address is None:
            return
        assert self._openai is not None
        self._picker = Picker(
            self._openai, KServe(self._gateway, self._config), wanted, self.intake, self._named,
            "" if replica is None else replica.member.id,
        )  # fmt: skip
        if replica is not None:
            self._picker.log.pass_on = replica.tell_sightings
            replica.hear_sightings(self._picker.log.hear)
        server = self._server(options=_bounds(wanted, MESSAGE_BYTES_MAX))
        self._picker.add_to(server)
        self._metrics.picker = self._picker.figures
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self.endpoint_picker = _bind(server, wanted, "endpoint_picker")

    def _named(self, address: str) -> str:
        """Return the backend at an address, "" if there is none."""
        return next((each.id for each in self._gateway.backends.values() if each.address == address), "")

    async def _open_probes(self) -> None:
        wanted = self._config.listeners.probes
        if wanted.address is not None:
            probes, tls = Probes(self._gateway, self._metrics), _http_tls(wanted.tls, wanted.address)
            self._probes = HttpProbes(probes, wanted.address, wanted.connections_max, tls)
            await self._probes.start()
            self.probes = self._probes.address

    def _calls(
        self,
        listener: GrpcListener,
        identify: Callable[[Presented, Purpose], Awaitable[Caller]],
        purpose_of: Callable[[str], tuple[Action, str]],
        hiding: Hiding | None = None,
    ) -> BoundedCalls:
        calls_max, on_refused = listener.calls_per_connection_max, self._gateway.turned_away
        return BoundedCalls(self.intake, calls_max, identify, purpose_of, hiding, on_refused)

    def _server(self, interceptors: Sequence[Any] = (), options: Sequence[tuple[str, int]] = ()) -> grpc.aio.Server:
        # If an option is given twice, gRPC takes the first.
        server: Any = grpc.aio.server(interceptors=list(interceptors), options=(*options, *SERVER_OPTIONS))
        # The limit of pending calls is for each registered method. One queue has one limit, and its calls cost less.
        server.add_registered_method_handlers = lambda service, handlers: None
        self._servers.append(server)
        return server  # type: ignore[no-any-return]


def chat_templates(configured: Sequence[Entry]) -> dict[str, ChatTemplate]:
    """Read the configured chat templates, by backend. Raises Misused naming one that is malformed."""
    return {
        backend.identity: read_chat_template(Path(backend.base_model.chat_template).expanduser())
        for backend in configured
        if backend.base_model is not None and backend.base_model.chat_template is not None
    }


def _reflect(server: grpc.aio.Server, described: Any) -> None:
    """Tell clients of a server's services: those of a module of ours, KServe's, and what every listener has."""
    names = [service.full_name for service in described.DESCRIPTOR.services_by_name.values()]
    reflection.enable_server_reflection([*names, KSERVE, health.SERVICE_NAME, reflection.SERVICE_NAME], server)


def _http_tls(tls: Tls | None, address: str) -> ssl.SSLContext | None:
    return None if tls is None else server_tls(tls.certificate, tls.key, tls.ca, address)


def _bounds(listener: GrpcListener, message_bytes_max: int) -> tuple[tuple[str, int], ...]:
    """Return gRPC's options for the limits of a listener's connections."""
    return (
        ("grpc.max_receive_message_length", message_bytes_max),
        ("grpc.max_allowed_incoming_connections", listener.connections_max),
        ("grpc.server_handshake_timeout_ms", max(1, round(listener.handshake_s * 1000))),
        ("grpc.max_connection_idle_ms", max(1, round(listener.idle_s * 1000))),
        *connection_calls_options(listener.calls_per_connection_max),
    )


def _bind(server: grpc.aio.Server, listener: Listener, name: str, calls: BoundedCalls | None = None) -> str:
    """Bind a listener's port and return its address. Raises Misused(PORT_IN_USE)."""
    credentials = None if listener.tls is None else _server_credentials(listener)
    try:
        _try(listener.address)
        if credentials is None:
            port = server.add_insecure_port(listener.address)
        else:
            port = server.add_secure_port(listener.address, credentials)
    except (OSError, RuntimeError) as error:
        raise Misused(
            Reason.PORT_IN_USE,
            f"the {name} listener cannot have {listener.address}: another process has the port, or the address is "
            f"not this machine's; choose another with listeners.{name}.address",
        ) from error
    if calls is not None:
        calls.port = port
    host = listener.address.rpartition(":")[0]
    return listener.address if listener.address.startswith("unix:") else f"{host}:{port}"


def _try(address: str) -> None:
    """Raise OSError if no socket can have an address: gRPC, which binds it, would log lines of its own about that."""
    host, _, port = address.rpartition(":")
    if address.startswith("unix:"):
        return
    refused: OSError | None = None
    for family, kind, protocol, _, place in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM):
        try:
            with socket.socket(family, kind, protocol) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(place)
                return
        except OSError as error:
            refused = error
    if refused is not None:
        raise refused


def _server_credentials(listener: Listener) -> grpc.ServerCredentials:
    tls = listener.tls
    assert tls is not None
    key, certificate = read_pem(tls.key), read_pem(tls.certificate)
    if key is None or certificate is None:
        raise Misused(Reason.CONFIG_INVALID, f"TLS for {listener.address} needs certificate and key")
    ca = read_pem(tls.ca)
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=ca is not None)
