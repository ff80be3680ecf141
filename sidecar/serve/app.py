"""A serving process: start it from a configuration, drain it, stop it, and end it after a crash."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sidecar.access.usage.keeper import UsageKeeper
from sidecar.adapters.disk import DiskTier
from sidecar.adapters.origins.allowing import AllowList
from sidecar.adapters.origins.limits import Limits
from sidecar.adapters.spool import Spool
from sidecar.backends.buffers import AnswerBuffers
from sidecar.backends.kind import Wiring
from sidecar.backends.registry import entries_of
from sidecar.backends.triton.loads import LoaderProcess
from sidecar.config import Config, plugins
from sidecar.config.discover import Discover
from sidecar.discovery.found import Finder
from sidecar.fronts.admin.checks import Checks
from sidecar.fronts.admin.usage import UsageCalls
from sidecar.journal.raised import Raised
from sidecar.journal.writer import Journal
from sidecar.kubernetes.placement import Seen, seen_here
from sidecar.replicas.board import SERVING
from sidecar.replicas.replica import Replica
from sidecar.serve.access_parts import AccessParts
from sidecar.serve.configured import ConfiguredBackends, settings_of
from sidecar.serve.discovered import BackendMaker, DiscoveredPools, finder_of
from sidecar.serve.listening import Listening
from sidecar.serve.membership import figures_of, join, link_of, member_of
from sidecar.serve.pool import (
    base_models,
    facts_of,
    make_backends,
    pools_of,
    prompt_counter_of,
    shared_memory_for,
    stagings_of,
)
from sidecar.serve.reloading import Parts, Reloads, Source
from sidecar.serve.restarting import Restarts
from sidecar.serve.served_folders import ServedFolders, roots_of
from sidecar.serve.telemetry import send_telemetry
from sidecar.shell.crash import Crash
from sidecar.shell.gateway import Gateway
from sidecar.shell.metrics import Metrics
from sidecar.shell.request_log import RequestLog
from sidecar.shell.sources import Sources
from sidecar.shell.usage import UsageObserver
from sidecar.shell.weights_check import WeightsCheck
from sidecar.state.registry import REGISTRY_FILE, Registry, SqliteRegistry, lock_data_directory
from sidecar.tasks import ended
from sidecar.telling.endings import ADD_BACKEND
from sidecar.telling.naming import version_label

if TYPE_CHECKING:
    from sidecar.kubernetes.declared import DeclaredAdapters
    from sidecar.state.redis.link import Link

logger = logging.getLogger(__name__)

REGISTRY_COPY = "registry-copy.sqlite"
"""The file in a data directory that has a copy of the names in Redis."""
TELL_S = 0.5
"""How long a listener's calls may take to end: after a drain or a crash their last answers are on the way."""
STOP_S = 15.0
"""How long a stop may take after its drain; the chart has Kubernetes wait for 20 s."""


class Sidecar:
    """A serving process. `start` makes one; `stop` ends it at once, `drain` first lets everything finish.

    `find(discover)` returns the finder of a pool's engines. `crash` reports that the process has to end. `source` is
    where the configuration was read, None if from no file.
    """

    def __init__(
        self,
        config: Config,
        find: Callable[[Discover], Finder] = finder_of,
        crash: Crash | None = None,
        source: Source | None = None,
    ) -> None:
        self.config = config
        """The configuration with which the process has started; that in force is the one of `reloads`."""
        self._source = source
        self.reloads: Reloads | None = None
        self._configured: ConfiguredBackends | None = None
        self.entries = entries_of(config)
        self.crash = crash or Crash()
        self._crashed = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._find = find
        self._lock: IO[str] | None = None
        self._journal: Journal | None = None
        self._loader = LoaderProcess()
        data = self._data_directory()
        self._link = link_of(config)
        self._member = member_of(config.replicas)
        self.registry = self._registry(data)
        self.replica: Replica | None = None
        self._draining: asyncio.Task[None] | None = None
        self._pools: DiscoveredPools | None = None
        self._declared: DeclaredAdapters | None = None
        self.access = AccessParts(config, data, self.registry, self._owner, self._member_ttl_s, self._member.id)
        core = replace(config.core(), pools=pools_of(self.entries))
        self._memory = shared_memory_for(self.entries, config.store.memory_bytes)
        self.gateway = Gateway(
            core,
            plugins.policies_of(core),
            self.registry,
            roots_of(config.adapters),
            config.client_stall_s,
            config.queue.inbox_max,
            sources=self._sources(data),
            bases=base_models(self.entries),
            disk=DiskTier(data / "blobs") if data is not None and core.disk_bytes else None,
            mount=self._memory.mount,
            stagings=stagings_of(self.entries),
            crash=self.crash,
            answers=AnswerBuffers(config.queue.answer_bytes_max, config.queue.answers_bytes_max),
            access=self.access.access,
            check=WeightsCheck(config.weights_check),
        )
        self.gateway.counter = prompt_counter_of(self.entries)
        self.metrics = Metrics(self.gateway, config.adapter_labels_max)
        self.restarts = Restarts(self.gateway, config.drain_timeout_s)
        self.metrics.waited_ns = self.gateway.driver.waited_ns
        self.metrics.wear = self.gateway.fleet.wear
        self.metrics.differing = lambda: self.gateway.fleet.check.differing
        self.metrics.audit = self.access.audit.log.figures
        self.metrics.denials = lambda: self.access.access.denials
        if self.access.external is not None:
            self.access.external.on_checked = self.metrics.checked
        self.metrics.keys_away_s = self.access.away_s
        self.metrics.policy = lambda: (self.access.policy.epoch, self.access.policy.fault)
        self.metrics.set_aside = lambda: len(self.gateway.catalogue.set_aside)
        self.gateway.observe(self.metrics, of_refused=True)
        log = RequestLog(lambda digest: version_label(self.gateway.state, digest))
        self.gateway.observe(log)
        self.gateway.chronicle.on_end.append(log.ended)
        self.usage = UsageKeeper(data, config.access.usage) if config.access.usage.enabled else None
        audit = self.access.audit.log
        self.gateway.writers = {"names": lambda: self.registry.fails, "the audit": lambda: bool(audit.failed)}
        if self.usage is not None:
            usage = self.usage
            self.gateway.writers["usage"] = lambda: usage.is_failing
            usage.meter.on_use = self.metrics.used
            self.metrics.usage_errors = lambda: usage.errors
            gateway = self.gateway
            observer = UsageObserver(gateway.core, self.usage, gateway.estimated, gateway.prompt_tokens)
            gateway.observe(observer, of_refused=True)
        if data is not None and config.journal.enabled:
            journal = config.journal
            self._journal = Journal(self.gateway.core, data / "journal", journal.segment_bytes, journal.segments_max)
            self.gateway.observe(self._journal, of_core=True)
            self.gateway.chronicle.older = "A journal tells of older ones: sidecar replay --explain ID DATA_DIRECTORY"
            self.metrics.journal = recorded = self._journal
            self.gateway.writers["the journal"] = lambda: recorded.figures.fails
            self.crash.then(self._journal.ended)
        self.telemetry = send_telemetry(config.otlp, self.gateway, self.metrics, self._member.id)
        self.crash.then(self._on_crash)
        self.access.calls += (Checks(self.access.policy, self.gateway), UsageCalls(self.usage, self.access.access))
        self.listening = Listening(config, self.entries, self.gateway, self.metrics, self.drain, self.access)
        self.served = ServedFolders(config.adapters, self.gateway.catalogue)

    @property
    def data_address(self) -> str:
        return self.listening.data

    @property
    def endpoint_picker_address(self) -> str:
        """HOST:PORT of the endpoint picker; "" if it is off."""
        return self.listening.endpoint_picker

    @property
    def admin_address(self) -> str:
        return self.listening.admin

    @property
    def http_address(self) -> str:
        return self.listening.http

    @property
    def _owner(self) -> str:
        """The name of this replica in its engines' logs; "" if it is the only one."""
        return "" if self.config.replicas.address is None else self._member.id

    @property
    def _member_ttl_s(self) -> float:
        replicas = self.config.replicas
        return self.config.state.member_ttl_s if replicas.address is None else replicas.lease_s

    def _data_directory(self) -> Path | None:
        if self.config.data_directory is None:
            return None
        data = Path(self.config.data_directory).expanduser().resolve()
        self._lock = lock_data_directory(data)
        return data

    def _registry(self, data: Path | None) -> Registry:
        """Return the registry: in the Redis that is configured, else in the data directory, else in memory."""
        if self._link is None:
            return SqliteRegistry(None if data is None else data / REGISTRY_FILE)
        from sidecar.state.redis.registry import RedisRegistry

        kept = None if data is None else data / REGISTRY_COPY
        return RedisRegistry(self._link, self._owner, self._member_ttl_s, kept)

    def _warn_of_unread_names(self) -> None:
        """Warn of names in the data directory if the Redis has none: they are not moved by themselves."""
        if self.config.data_directory is not None and not self.registry.all():
            file = Path(self.config.data_directory).expanduser() / REGISTRY_FILE
            if file.exists():
                logger.warning("names in %s are not read: state.url is set. sidecar state migrate moves them", file)

    def _sources(self, data: Path | None) -> Sources:
        origins = self.config.origins
        limits = Limits(
            size_bytes_max=origins.size_bytes_max,
            attempts_max=origins.attempts_max,
            timeout_s=origins.timeout_s,
            duration_s_max=origins.duration_s_max,
        )
        return Sources(
            AllowList.of(origins.allow, roots_of(self.config.adapters)), Spool(data), limits, origins.downloads_max
        )

    @classmethod
    async def start(
        cls,
        config: Config,
        find: Callable[[Discover], Finder] = finder_of,
        crash: Crash | None = None,
        source: Source | None = None,
    ) -> Sidecar:
        """Start to serve. Raises Misused naming the obstacle; nothing is left behind then."""
        sidecar = cls(config, find, crash, source)
        try:
            await sidecar._start()
        except BaseException:
            await sidecar._stop_after_all()
            raise
        return sidecar

    async def _start(self) -> None:
        await self._loader.start()  # first: gRPC's threads print a warning for every later fork
        wiring = Wiring(self._loader, self._memory, self._owner)
        backends = make_backends(self.entries, wiring)
        if self._journal is not None:
            self._journal.start()
        await self.registry.start()
        await self.access.start()
        if self.usage is not None:
            await self.usage.start()
        if self.config.state.url is not None:
            self._warn_of_unread_names()
        if self._link is not None and self.config.replicas.address is not None:
            await self._join(self._link)
        adapters = self.config.kubernetes.adapters
        if adapters.config_maps or adapters.custom_resources:
            self._follow_cluster()
        await self.gateway.start(backends)
        if self.replica is not None:
            self.replica.start()
        for entry in self.entries:
            if entry.discover is None:
                self.restarts.declare(entry)
        self.restarts.start(self.replica)
        maker = BackendMaker(self.gateway, self.replica, wiring, self.restarts)
        self._pools = DiscoveredPools(self.entries, maker, self._find, self.config.drain_timeout_s)
        self._pools.start()
        present = settings_of(self.entries, facts_of(self.entries))
        self._configured = ConfiguredBackends(maker, present, self.config.drain_timeout_s)
        if not self.entries:
            logger.warning("no engine is configured; %s", ADD_BACKEND)
        await self.served.start()
        if self._declared is not None:
            self._declared.start()
            await self._declared.first_look()
        self._change_with(self._configured, self._pools)
        await self.listening.open(self.replica)

    def _change_with(self, backends: ConfiguredBackends, pools: DiscoveredPools) -> None:
        """Let the configuration change from now on."""
        shared = self._memory.mount is not None
        parts = Parts(self.gateway, self.access, self.listening, backends, pools, self.served, shared)
        self.reloads = reloads = Reloads(self.config, parts, self._source)
        self.listening.changes = reloads
        self.metrics.config = lambda: (reloads.figures.successful, reloads.figures.read_at)
        reloads.start()

    async def _join(self, link: Link) -> None:
        replica = await join(self.config, self.entries, self.gateway, self.registry, link, self._member, self.listening)
        self.replica = replica
        self.access.count_replicas = lambda: len(replica.members())
        self.metrics.replica = lambda: figures_of(replica, self.registry)

    def _follow_cluster(self) -> None:
        """Follow the adapters that the cluster declares. Raises Misused if there is no cluster."""
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
        """Return all backends as their owners report them."""
        if self.replica is None:
            return seen_here(self.gateway.state)
        standings = self.replica.board.standings
        return {backend: Seen(known.report.state == SERVING, known.resident) for backend, known in standings.items()}

    async def run_until_signalled(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until SIGTERM or SIGINT, then let everything in flight finish; a second signal stops at once.

        `ready` is called once signals are handled: whoever is told may send one at once.
        Also returns after a drain by the drain listener. Raises Failed(SIDECAR_FAILED) if the process crashed; it does
        not wait for a signal then.
        """
        signals: asyncio.Queue[None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, signals.put_nowait, None)
        if self.reloads is not None and self._source is not None:  # without a file, a closed terminal ends it as ever
            loop.add_signal_handler(signal.SIGHUP, self.reloads.hung_up)
        ready()
        await _first(self._until_stopped(signals), self._crashed.wait())
        await self._stop_after_all()
        if self.crash.raised is not None:
            raise self.crash.error()
        logger.info("stopped")

    async def _until_stopped(self, signals: asyncio.Queue[None]) -> None:
        if not await self._first_signal(signals):
            return
        logger.warning(
            "draining: nothing new is admitted, %s requests finish within %.0f s; signal again to stop now",
            len(self.gateway.state.requests),
            self.config.drain_timeout_s,
        )
        self.crash.within(self.config.drain_timeout_s + STOP_S)
        await _tried(_first(self.drain(), signals.get()))

    async def _first_signal(self, signals: asyncio.Queue[None]) -> bool:
        """Wait for the first signal or the end of a drain; return True if it was a signal."""
        return await _first(signals.get(), self.listening.drained.wait())

    async def drain(self) -> None:
        """Admit nothing new, and wait at most `drain_timeout_s` until all requests and streams have ended.

        Further calls wait for the same drain.
        """
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        await asyncio.shield(self._draining)

    async def _drain(self) -> None:
        await self.restarts.stop()
        if self.reloads is not None:
            self.reloads.watch_no_longer()
        if self._pools is not None:
            await self._pools.stop()
        await self.listening.refuse()
        try:
            async with asyncio.timeout(self.config.drain_timeout_s):
                giving_up = None if self.replica is None else asyncio.create_task(self.replica.drain())
                await self.gateway.drain()
                if self.listening.loads is not None:
                    await self.listening.loads.all_over()
                if giving_up is not None:
                    await giving_up
                if self.listening.streams is not None:
                    await self.listening.streams.all_over()
        except TimeoutError:
            seconds = self.config.drain_timeout_s
            logger.warning("requests still ran after drain_timeout_s (%s s) and are cut off", seconds)

    # A crash.

    def _on_crash(self, raised: Raised) -> None:
        """Begin to end. Nothing is admitted any more."""
        self._crashed.set()
        self._ending = asyncio.create_task(self._end_open(raised))

    async def _end_open(self, raised: Raised) -> None:
        """Refuse probes, stop runs at engines, only then give backends up to other replicas, and end all requests."""
        await _tried(self.listening.refuse())
        await _tried(self.gateway.abandon())
        if self.replica is not None:
            await _tried(self.replica.give_up())
        self.gateway.end_open(raised)
        await self.gateway.told()

    async def _stop_after_all(self) -> None:
        """Stop, in time; after a crash as far as that is possible."""
        self.crash.within(STOP_S)
        if self.crash.raised is None:
            await self.stop()
        else:
            await _tried(self.stop())

    async def stop(self) -> None:
        """Stop at once; open requests are cut off, and their clients are told so."""
        if self._ending is not None:
            await _tried(self._ending)
        await self.served.stop()
        is_drained = self._draining is not None and self._draining.done() and not self._draining.cancelled()
        await ended(self._draining)
        was_cut_off = self.crash.raised is None and await self.gateway.cut_off()
        await self.restarts.stop()
        if self.reloads is not None:
            await self.reloads.stop()
        if self._configured is not None:
            await self._configured.stop()
        if self._pools is not None:
            await self._pools.stop()
        if self.replica is not None:
            await self.replica.leave()
        # A call that came at the last moment of a drain still gets its answer.
        has_answers = is_drained or was_cut_off or self.crash.raised is not None
        await self.listening.close(TELL_S if has_answers else 0)
        if self._declared is not None:
            await self._declared.stop()
        if self.replica is not None:
            await self.replica.stop()
        await self.registry.close()  # before the gateway, which takes no changes once it has stopped
        await self.gateway.stop()
        await self.access.stop()
        if self.gateway.counter is not None:
            self.gateway.counter.close()
        if self.usage is not None:
            await self.usage.stop()
        if self.telemetry is not None:
            await self.telemetry.stop()
        await self._loader.close()
        if self._memory.mount is not None:
            self._memory.mount.close()
        if self._journal is not None:
            self._journal.stop()
        if self._lock is not None:
            self._lock.close()


async def _first(one: Coroutine[Any, Any, object], other: Coroutine[Any, Any, object]) -> bool:
    """Wait until one of two ends, cancel the other, and return True if the first one has ended. Raises its error."""
    tasks = asyncio.create_task(one), asyncio.create_task(other)
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await ended(*tasks)
    for task in done:
        task.result()
    return tasks[0] in done


async def _tried(work: Awaitable[object]) -> None:
    """Carry out one part of an ending, and log its failure: the parts after it must follow in any case."""
    try:
        await work
    except Exception:
        logger.exception("a part of the ending failed")
