"""Put the parts together: one process with its three listeners, from a configuration to a clean exit."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from random import random
from secrets import token_hex
from socket import gethostname
from time import time
from typing import IO, TYPE_CHECKING, Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sidecar import plugins
from sidecar.adapters.disk import DiskTier
from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.origins.limits import Limits
from sidecar.adapters.spool import Spool
from sidecar.backends.credentials import open_channel, read_pem
from sidecar.backends.loads import LoaderProcess
from sidecar.config import Backend as BackendConfig
from sidecar.config import Config, Listener, Replicas
from sidecar.errors import Invalid, Misused, Reason, Refused
from sidecar.fronts.admin import add_admin
from sidecar.fronts.auth import TokenInterceptor
from sidecar.fronts.generate import GatewayService
from sidecar.fronts.http import HttpFront, server_tls
from sidecar.fronts.http_connection import HttpLimits
from sidecar.fronts.http_drain import HttpDrain
from sidecar.fronts.kserve import add_kserve
from sidecar.fronts.kserve_admin import add_kserve_admin
from sidecar.fronts.kserve_lifetime import Lifetimes, connection_age_options
from sidecar.fronts.openai.chat_templates import ChatTemplate, read_chat_template
from sidecar.fronts.openai.front import OpenAiFront
from sidecar.kubernetes.places import Seen, seen_here
from sidecar.ownership.facts import Bounds, Member
from sidecar.pool import base_models, make_backends, shared_memory_for, stagings_of
from sidecar.proto import admin_pb2, gateway_pb2, gateway_pb2_grpc
from sidecar.replicas.board import SERVING
from sidecar.replicas.replica import Replica
from sidecar.shell.catalogue import Wanted
from sidecar.shell.gateway import Gateway
from sidecar.shell.journal import Journal
from sidecar.shell.metrics import Metrics, ReplicaFigures
from sidecar.shell.request_log import RequestLog
from sidecar.shell.sources import Sources
from sidecar.state.registry import REGISTRY_FILE, Registry, SqliteRegistry, lock_data_directory

if TYPE_CHECKING:
    from sidecar.kubernetes.declared import DeclaredAdapters
    from sidecar.state.redis.link import Link

logger = logging.getLogger(__name__)

SERVER_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)
RECONCILE_S = 1.0


class Sidecar:
    """A serving process. `start` makes one; `stop` ends it at once, `drain` first lets everything finish."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data_address = self.admin_address = self.http_address = ""
        self._lock: IO[str] | None = None
        self._servers: list[grpc.aio.Server] = []
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._journal: Journal | None = None
        self._http: HttpFront | None = None
        self._streams: Lifetimes | None = None
        self._loader = LoaderProcess()
        self._reconciling: asyncio.Task[None] | None = None
        self._unserved: set[Path] = set()
        """Folders that are to be served and could not be registered yet."""
        data = self._data_directory()
        self._link = None if config.state.url is None else _link(config)
        self._member = _member(config.replicas)
        self.registry = self._registry(data)
        self.replica: Replica | None = None
        self._drain_front: HttpDrain | None = None
        self.drain_address = ""
        self._draining: asyncio.Task[None] | None = None
        self._declared: DeclaredAdapters | None = None
        core = config.core()
        self._memory = shared_memory_for(config)
        self.gateway = Gateway(
            core,
            plugins.policies_of(core),
            self.registry,
            self._roots(),
            config.client_stall_s,
            config.queue.inbox_max,
            sources=self._sources(data),
            bases=base_models(config.backends),
            disk=DiskTier(data / "blobs") if data is not None and core.disk_bytes else None,
            mount=self._memory.mount,
            stagings=stagings_of(config.backends),
        )
        self.metrics = Metrics(self.gateway, config.adapter_labels_max)
        self.gateway.observe(self.metrics, at_the_door=True)
        self.gateway.observe(RequestLog(), at_the_door=True)
        if data is not None and config.journal.enabled:
            journal = config.journal
            self._journal = Journal(self.gateway.core, data / "journal", journal.segment_bytes, journal.segments_max)
            self.gateway.observe(self._journal)
            self.metrics.journal = self._journal

    @property
    def _owner(self) -> str:
        """Return what this replica is called by the engines that it owns, "" if it is the only one."""
        return "" if self.config.replicas.address is None else self._member.id

    def _data_directory(self) -> Path | None:
        if self.config.data_directory is None:
            return None
        data = Path(self.config.data_directory).expanduser().resolve()
        self._lock = lock_data_directory(data)
        return data

    def _registry(self, data: Path | None) -> Registry:
        """Return the registry: in the Redis that is named, else in the data directory, else in memory only."""
        if self._link is None:
            return SqliteRegistry(None if data is None else data / REGISTRY_FILE)
        from sidecar.state.redis.registry import RedisRegistry

        replicas, state = self.config.replicas, self.config.state
        ttl_s = state.member_ttl_s if replicas.address is None else replicas.lease_s
        return RedisRegistry(self._link, self._owner, ttl_s)

    def _tell_of_another_registry(self) -> None:
        """Say where names from before are when there are none in the Redis: they do not move by themselves."""
        if self.config.data_directory is not None and not self.registry.all():
            file = Path(self.config.data_directory).expanduser() / REGISTRY_FILE
            if file.exists():
                logger.warning("names in %s are not read: state.url is set. sidecar state migrate moves them", file)

    def _roots(self) -> list[Path]:
        adapters = self.config.adapters
        roots = [*adapters.roots, *([adapters.serve] if adapters.serve else [])]
        return [Path(root).expanduser() for root in roots]

    def _sources(self, data: Path | None) -> Sources:
        origins = self.config.origins
        limits = Limits(
            size_bytes_max=origins.size_bytes_max,
            attempts_max=origins.attempts_max,
            timeout_s=origins.timeout_s,
            duration_s_max=origins.duration_s_max,
        )
        return Sources(AllowList.of(origins.allow, self._roots()), Spool(data), limits, origins.downloads_max)

    @classmethod
    async def start(cls, config: Config) -> Sidecar:
        """Start to serve. Raises Misused naming what is in the way; nothing is left behind then."""
        sidecar = cls(config)
        try:
            await sidecar._start()
        except BaseException:
            await sidecar.stop()
            raise
        return sidecar

    async def _start(self) -> None:
        await self._loader.start()  # first: gRPC's threads are told of on the terminal by every fork that comes later
        backends = make_backends(self.config.backends, self._loader, self._memory, self._owner)
        if self._journal is not None:
            self._journal.start()
        await self.registry.start()
        if self.config.state.url is not None:
            self._tell_of_another_registry()
        if self.config.replicas.address is not None:
            self._join(self.config.replicas)
        adapters = self.config.kubernetes.adapters
        if adapters.config_maps or adapters.custom_resources:
            self._follow_cluster()
        await self.gateway.start(backends)
        if self.replica is not None:
            self.replica.start()
        if not backends:
            logger.warning("no backend is configured: name one with --backend triton://HOST:PORT, or under backends")
        served = _served_folders(self.config.adapters.serve)
        await asyncio.gather(*(self._register_served(path) for path in served))
        self._reconciling = asyncio.create_task(self._reconcile(served))
        if self._declared is not None:
            self._declared.start()
            await self._declared.first_look()
        await self._listen()

    def _join(self, wanted: Replicas) -> None:
        """Listen to the other replicas, and be one of them."""
        from sidecar.replicas.leases import RedisLeases
        from sidecar.state.redis.members import RedisMembers

        assert self._link is not None
        server = self._server([])
        address = _bind(server, wanted.listener, "replicas")
        here = wanted.advertise or _reached_at(address)
        bounds = Bounds.of_lease(int(wanted.lease_s * 1e9))
        members = RedisMembers(self._link, bounds)
        leases = RedisLeases(members, self._member, here, lambda: self.registry.last_change, wanted.lease_s)
        tls = None if wanted.tls is None else wanted.tls.model_dump(exclude_none=True)
        policies = plugins.policies_of(self.config.core())
        self.replica = Replica(
            self.gateway,
            self._member,
            here,
            {backend.identity: "" for backend in self.config.backends},
            leases,
            bounds,
            random(),
            lambda to: open_channel(to, tls),
            policies.routing,
        )
        self.replica.add_to(server)
        self.metrics.replica = self._replica_figures

    def _follow_cluster(self) -> None:
        """Have adapters that are declared in the cluster registered. Raises Misused when there is no cluster."""
        from sidecar.kubernetes.access import find_access
        from sidecar.kubernetes.declared import DeclaredAdapters

        wanted, replica = self.config.kubernetes, self.replica
        access = find_access()
        self._declared = declared = DeclaredAdapters(
            access,
            self.gateway,
            self._seen,
            lambda: replica is None or replica.keeper.leads_since is not None,
            self._member.name,
            wanted.namespace or access.namespace,
            wanted.adapters.label if wanted.adapters.config_maps else None,
            wanted.adapters.custom_resources,
        )
        self.metrics.declared = lambda: declared.phases

    def _seen(self) -> dict[str, Seen]:
        """Return all backends as their owners tell of them."""
        if self.replica is None:
            return seen_here(self.gateway.state)
        standings = self.replica.board.standings
        return {backend: Seen(known.state == SERVING, known.resident) for backend, known in standings.items()}

    def _replica_figures(self) -> ReplicaFigures:
        replica, away_since = self.replica, self.registry.away_since
        assert replica is not None
        return ReplicaFigures(
            replica.keeper.changes["taken"],
            replica.keeper.changes["given_up"],
            replica.router.forwards,
            replica.router.reroutes,
            replica.router.unowned,
            len(replica.members()),
            self.registry.lag,
            0.0 if away_since is None else time() - away_since,
        )

    async def _register_served(self, path: Path) -> None:
        """Register a PEFT subfolder of `adapters.serve` under its own name; a wrong one is told and left out.

        What others keep from being written down, or have not read in time, is tried again: a replica must not need them
        to start.
        """
        self._unserved.discard(path)
        try:
            allow = self.config.adapters.allow.get(path.name, ())
            await self.gateway.catalogue.register(path.name, str(path), Wanted(allow, managed_by="config"))
        except Invalid as error:
            logger.error("not served: %s", error.message)
        except Refused as refused:
            logger.warning("%s is not registered yet: %s", path.name, refused.message)
            self._unserved.add(path)

    async def _reconcile(self, served: Sequence[Path]) -> None:
        """Set a name to what the configuration says: one that could not be yet, or whose override has run out."""
        while True:
            await asyncio.sleep(RECONCILE_S)
            for path in served:
                try:
                    ended = await self.gateway.catalogue.hold_ended(path.name)
                except Refused as refused:  # for now: it is looked at again in a moment
                    logger.warning("%s is not yet as configured again: %s", path.name, refused.message)
                    continue
                if ended:
                    logger.info("%s is no longer held and is as configured again", path.name)
                if ended or path in self._unserved:
                    await self._register_served(path)

    async def _listen(self) -> None:
        listeners = self.config.listeners
        data = self._server([], connection_age_options(listeners.data.max_connection_age_s))
        service = GatewayService(self.gateway, self.config.tenant_from, self.config.hide_backend)
        gateway_pb2_grpc.add_GatewayServicer_to_server(service, data)
        self._streams = add_kserve(data, self.gateway, self.config).lifetimes
        health_pb2_grpc.add_HealthServicer_to_server(self._health, data)
        self.data_address = _bind(data, listeners.data, "data")

        token_file = listeners.admin.token_file
        admin = self._server([TokenInterceptor(Path(token_file))] if token_file else [])
        add_admin(admin, self.gateway, self.replica)
        add_kserve_admin(admin, self.gateway)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, admin)
        names = [d.full_name for pb in (gateway_pb2, admin_pb2) for d in pb.DESCRIPTOR.services_by_name.values()]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], admin)
        self.admin_address = _bind(admin, listeners.admin, "admin")

        http = listeners.http
        tls = None if http.tls is None else server_tls(http.tls.certificate, http.tls.key, http.tls.ca, http.address)
        self._http = HttpFront(
            self.gateway,
            self.metrics,
            http.address,
            self.data_address,
            OpenAiFront(self.gateway, self.config, chat_templates(self.config.backends)),
            HttpLimits(http.connections_max),
            tls,
        )
        await self._http.start()
        self.http_address = self._http.address
        if listeners.drain.address is not None:
            self._drain_front = HttpDrain(self.drain, listeners.drain.address)
            await self._drain_front.start()
            self.drain_address = self._drain_front.address
        for server in self._servers:
            await server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    def _server(self, interceptors: Sequence[Any], options: Sequence[tuple[str, int]] = ()) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=interceptors, options=(*SERVER_OPTIONS, *options))
        self._servers.append(server)
        return server

    async def run_until_signalled(self) -> None:
        """Serve until SIGTERM or SIGINT, then let everything in flight finish; a second signal ends that at once."""
        signals: asyncio.Queue[None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, signals.put_nowait, None)
        await signals.get()
        logger.warning(
            "draining: nothing new is admitted, %s requests finish within %.0f s; signal again to stop now",
            len(self.gateway.state.requests),
            self.config.drain_timeout_s,
        )
        draining, again = asyncio.create_task(self.drain()), asyncio.create_task(signals.get())
        _, pending = await asyncio.wait((draining, again), return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        await self.stop()

    async def drain(self) -> None:
        """Admit nothing new and wait for what is here, at most `drain_timeout_s`; then no stream is open any more.

        Asked again, the same drain is waited for.
        """
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        await asyncio.shield(self._draining)

    async def _drain(self) -> None:
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            async with asyncio.timeout(self.config.drain_timeout_s):
                giving_up = None if self.replica is None else asyncio.create_task(self.replica.drain())
                await self.gateway.drain()
                if giving_up is not None:
                    await giving_up
                if self._streams is not None:
                    await self._streams.all_over()
        except TimeoutError:
            seconds = self.config.drain_timeout_s
            logger.warning("requests still ran after drain_timeout_s (%s s) and are cut off", seconds)

    async def stop(self) -> None:
        """End at once: calls that are still open are cancelled."""
        if self._reconciling is not None:
            self._reconciling.cancel()
        if self._draining is not None:
            self._draining.cancel()
        if self._drain_front is not None:
            await self._drain_front.stop()
        if self.replica is not None:
            await self.replica.leave()
        for server in self._servers:
            await server.stop(0)
        if self._http is not None:
            await self._http.stop()
        if self._declared is not None:
            await self._declared.stop()
        if self.replica is not None:
            await self.replica.stop()
        await self.registry.close()  # before the gateway, which takes no change any more once it has stopped
        await self.gateway.stop()
        await self._loader.close()
        if self._memory.mount is not None:
            self._memory.mount.close()
        if self._journal is not None:
            self._journal.stop()
        if self._lock is not None:
            self._lock.close()


def _link(config: Config) -> Link:
    from sidecar.state.redis.link import Link  # the client is loaded only where there is a Redis

    return Link(config.state.place)


def _reached_at(address: str) -> str:
    """Return where others reach a listener: by this machine's name, if it listens at all of its addresses."""
    host, _, port = address.rpartition(":")
    return f"{gethostname()}:{port}" if host in ("", "0.0.0.0", "[::]") else address


def _member(replicas: Replicas) -> Member:
    """Return this life of this replica."""
    name = replicas.name or gethostname()
    return Member(f"{name}-{token_hex(4)}", name, replicas.weight)


def chat_templates(configured: Sequence[BackendConfig]) -> dict[str, ChatTemplate]:
    """Read the chat templates that are named, by backend. Raises Misused with what is wrong with one."""
    return {
        backend.identity: read_chat_template(Path(backend.base_model.chat_template).expanduser())
        for backend in configured
        if backend.base_model is not None and backend.base_model.chat_template is not None
    }


def _served_folders(serve: str | None) -> list[Path]:
    if serve is None:
        return []
    folder = Path(serve).expanduser()
    if not folder.is_dir():
        raise Misused(Reason.CONFIG_INVALID, f"adapters.serve: {folder} is not a folder")
    return [path for path in sorted(folder.iterdir()) if (path / "adapter_config.json").is_file()]


def _bind(server: grpc.aio.Server, listener: Listener, name: str) -> str:
    """Open a listener's port and return its address. Raises Misused(PORT_IN_USE)."""
    try:
        if listener.tls is None:
            port = server.add_insecure_port(listener.address)
        else:
            port = server.add_secure_port(listener.address, _server_credentials(listener))
    except RuntimeError as error:
        raise Misused(
            Reason.PORT_IN_USE,
            f"the {name} listener cannot have {listener.address}: another process has the port, or the address is "
            f"not this machine's; choose another with listeners.{name}.address",
        ) from error
    host = listener.address.rpartition(":")[0]
    return listener.address if listener.address.startswith("unix:") else f"{host}:{port}"


def _server_credentials(listener: Listener) -> grpc.ServerCredentials:
    tls = listener.tls
    assert tls is not None
    key, certificate = read_pem(tls.key), read_pem(tls.certificate)
    if key is None or certificate is None:
        raise Misused(Reason.CONFIG_INVALID, f"TLS for {listener.address} needs certificate and key")
    ca = read_pem(tls.ca)
    return grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=ca is not None)
