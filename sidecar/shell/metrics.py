"""The process's metrics: what each step adds to them, and how they are rendered.

Counts and durations are taken as they happen, at a few microseconds a step. Gauges are read from the core's state when
`/metrics` is requested. The text is rendered in a thread, since thousands of series take a while.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Any, Protocol

from prometheus_client.core import Metric as Family

from sidecar.access.access import DENIALS
from sidecar.access.audit_log import KINDS
from sidecar.access.external import RESULTS
from sidecar.access.usage.meter import OTHERS, tenant_of
from sidecar.adapters.packed import PackReport
from sidecar.backends.api import Wear
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.core import Core
from sidecar.core.enums import Cache, Outcome
from sidecar.core.state import Request
from sidecar.errors import Reason
from sidecar.journal.writer import Journal, JournalFigures
from sidecar.shell.driver import goes_on
from sidecar.shell.loop_watch import LoopWatch
from sidecar.shell.metric_table import BASE_MODEL, OTHER, LabelValues
from sidecar.shell.metric_table import METRICS as METRICS
from sidecar.shell.model_server import ModelServer
from sidecar.shell.series import (
    BOUND_BUCKETS_S,
    CHECK_BUCKETS_S,
    FEW_WAIT_BUCKETS_S,
    LOAD_BUCKETS_S,
    WAIT_BUCKETS_S,
    Page,
    Series,
)
from sidecar.shell.state_gauges import families_of, family

logger = logging.getLogger(__name__)

DECLARED_PHASES = ("Pending", "Loading", "Ready", "Held", "Failed", "Removing")
TENANT_LABELS_MAX = 200
"""Tenants with a label, in addition to those named in `queue.tenant_weights`."""
TOKEN_SERIES_MAX = 20_000
"""Series by adapter and tenant; pairs past it are counted as tenant `_other`."""


class Watched(Protocol):
    """The part of `Gateway` that is measured."""

    @property
    def core(self) -> Core: ...

    @property
    def tickets(self) -> Sized:
        """The open requests."""

    def on_packed(self, callback: Callable[[str, PackReport], None]) -> None:
        """Call back with the key and report of every packing."""


PICKED, TOLD = ("held", "sent", "answering", "unseen"), ("used", "passed_on", "unknown")


@dataclass(frozen=True)
class ArrivalFigures:
    """Bytes of incomplete messages, and messages refused since the start, by reason."""

    held_bytes: int = 0
    refused: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(("budget", "late", "calls"), 0))


@dataclass(frozen=True)
class PickerFigures:
    """Requests that a gateway asks about, by where they are; log entries, by what became of them; answers by others."""

    requests: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(PICKED, 0))
    entries: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(TOLD, 0))
    elsewhere: int = 0


@dataclass(frozen=True)
class ReplicaFigures:
    """Counts of a process among replicas; the defaults are those of one that runs alone."""

    taken: int = 0
    given_up: int = 0
    forwards: int = 0
    reroutes: int = 0
    unowned: int = 0
    replicas: int = 1
    state_lag: int = 0
    state_away_s: float = 0.0


class Metrics:
    """An observer of the core with a registry of its own, which shows exactly `METRICS`.

    `adapter_labels_max` bounds the adapters that get series of their own. An adapter's series end when its name is
    unregistered. `clock` returns the core's time in nanoseconds.
    """

    def __init__(
        self, gateway: Watched, adapter_labels_max: int = 200, clock: Callable[[], int] = monotonic_ns
    ) -> None:
        self._core = gateway.core
        self._gateway = gateway
        self._clock = clock
        gateway.on_packed(self.packed)
        self.journal: Journal | None = None
        """Source of the journal's figures; set by its starter."""
        self.replica: Callable[[], ReplicaFigures] = ReplicaFigures
        """Source of the figures between replicas; set by the process that joins others."""
        self.arrivals: Callable[[], ArrivalFigures] = ArrivalFigures
        """Source of the figures of incomplete messages; set by the listeners."""
        self.picker: Callable[[], PickerFigures] = PickerFigures
        """Source of the endpoint picker's figures; set by the listeners."""
        self.declared: Callable[[], Mapping[str, int]] = dict
        """Source of the declared adapters' number by phase; set by the follower of a cluster."""
        self.waited_ns: Mapping[int, int] = {}
        """How long requests had waited before the core got them; set by the owner of the driver."""
        self.wear: Callable[[], Mapping[str, Wear]] = dict
        """Source of what engines keep until they are restarted; set by the owner of the backends."""
        self.differing: Callable[[], Collection[str]] = tuple
        """Source of the engines that answer otherwise than before or than others; set by the owner of the backends."""
        self.set_aside: Callable[[], int] = int
        """Source of the number of names set aside; set by the owner of a registry."""
        self.denials: Callable[[], Mapping[tuple[str, str], int]] = lambda: dict.fromkeys(DENIALS, 0)
        """Source of the denials by cause, and whether they were only observed; set by the owner of access."""
        self.keys_away_s: Callable[[], float] = float
        """Source of the time since which keys and limits are not read anew; set by the owner of access."""
        self.policy: Callable[[], tuple[int, str]] = lambda: (0, "")
        """Source of the epoch of the policies and of what is wrong with their file; set by the owner of access."""
        self.config: Callable[[], tuple[bool, float]] = lambda: (True, 0.0)
        """Source of whether the last reload succeeded, and of the time of the last that did; set by what reloads."""
        self.usage_errors: Callable[[], int] = int
        """Source of the number of failed writes of usage; set by its starter."""
        self.audit: Callable[[], Mapping[str, tuple[int, int]]] = lambda: dict.fromkeys(KINDS, (0, 0))
        """Source of the audit's written and lost lines by kind; set by its starter."""
        self.traces: Callable[[], Mapping[str, int]] = lambda: dict.fromkeys(("sent", "failed", "dropped"), 0)
        """Source of the traces by what became of them; set by their starter."""
        self._page = Page()
        self.model_server = ModelServer(self._core.state)
        self._watch = LoopWatch()
        self._adapters = LabelValues(adapter_labels_max)
        self._tenants = LabelValues(TENANT_LABELS_MAX, self._core.state.config.tenant_weights)
        self._steps = 0
        self._refused_before_core = 0
        self._dispatched: dict[int, None] = {}
        self._waiting: dict[int, int | None] = {}
        """What was promised to admitted requests that have had no token yet, whether or not it has become void."""
        self._loads: dict[int, tuple[str, int]] = {}
        self._make_series()

    def _make_series(self) -> None:
        registry = self._page.registry
        self._requests = Series("requests_total", registry)
        self._adapter_requests = Series("adapter_requests_total", registry)
        self._class_requests = Series("class_requests_total", registry)
        self._tenant_requests = Series("tenant_requests_total", registry)
        self._tenant_refusals = Series("tenant_refusals_total", registry)
        self._tenant_seats = Series("tenant_seat_seconds_total", registry)
        self._tokens = Series("tokens_total", registry)
        self._queue_wait = Series("queue_wait_seconds", registry, WAIT_BUCKETS_S)
        self._tenant_wait = Series("tenant_wait_seconds", registry, FEW_WAIT_BUCKETS_S)
        self._adapter_wait = Series("adapter_wait_seconds", registry, FEW_WAIT_BUCKETS_S)
        self._folded = Series("waits_folded_total", registry)
        self._bounds = Series("wait_bounds_total", registry)
        self._wait_bound = Series("wait_bound_seconds", registry, BOUND_BUCKETS_S)
        self._first_token = Series("first_token_seconds", registry, WAIT_BUCKETS_S)
        self._exceeded = Series("wait_bounds_exceeded_total", registry)
        self._dispatches = Series("dispatches_total", registry)
        self._load_time = Series("load_seconds", registry, LOAD_BUCKETS_S)
        self._load_results = Series("loads_total", registry)
        self._fetch_results = Series("fetches_total", registry)
        self._heals = Series("heals_total", registry)
        self._quarantines = Series("quarantines_total", registry)
        self._checks = Series("external_checks_total", registry)
        self._check_time = Series("external_check_seconds", registry, CHECK_BUCKETS_S)
        for outcome in Outcome:  # present from the start, so that a first failure is an increase
            self._requests.begin(outcome.value)
        self._exceeded.begin()
        for cache in Cache:
            self._dispatches.begin(cache.value)
        for result in ("ok", "failed"):
            self._fetch_results.begin(result)
        for label in ("adapter", "tenant"):
            self._folded.begin(label)
        for result in RESULTS:
            self._checks.begin(result)

    def start(self) -> None:
        """Begin to measure the event loop."""
        self._watch.start()

    def stop(self) -> None:
        self._watch.stop()

    async def render(self, accept: str = "") -> tuple[str, bytes]:
        """Return content type and text of all metrics in the format that an Accept header asks for."""
        return await self._page.render(self._families, accept)

    def _families(self) -> list[Family]:
        between, arrivals, picker = self.replica(), self.arrivals(), self.picker()
        epoch, fault = self.policy()
        is_reloaded, read_at = self.config()
        figures = self.journal.figures if self.journal is not None else JournalFigures(0, 0, 0, 0, False)
        counted = {
            "open_calls": len(self._gateway.tickets),
            "arriving_bytes": arrivals.held_bytes,
            "picker_elsewhere_total": picker.elsewhere,
            "steps_total": self._steps,
            "event_loop_stall_seconds": self._watch.take_longest_s(),
            "journal_bytes_total": figures.written_bytes,
            "journal_gaps_total": figures.gaps,
            "journal_errors_total": figures.errors,
            "forwards_total": between.forwards,
            "reroutes_total": between.reroutes,
            "unowned_total": between.unowned,
            "replicas": between.replicas,
            "adapters_set_aside": self.set_aside(),
            "state_lag_changes": between.state_lag,
            "state_away_seconds": between.state_away_s,
            "access_state_away_seconds": self.keys_away_s(),
            "policy_epoch": epoch,
            "policy_faulty": int(bool(fault)),
            "config_last_reload_successful": int(is_reloaded),
            "config_last_reload_success_timestamp_seconds": read_at,
            "usage_errors_total": self.usage_errors(),
        }
        waiting = [bound for request, bound in self._waiting.items() if request not in self._dispatched]
        promised = [bound for bound in waiting if bound is not None]
        if promised or not waiting:
            counted["longest_promised_wait_seconds"] = max(promised, default=0) / 1e9
        changes = [(("taken",), between.taken), (("given_up",), between.given_up)]
        found = [family(short, [((), value)]) for short, value in counted.items()]
        return [
            *families_of(self._core.state, self._clock()),
            family("ownership_changes_total", changes),
            family("arrivals_refused_total", [((why,), count) for why, count in arrivals.refused.items()]),
            family("picker_requests", [((where,), count) for where, count in picker.requests.items()]),
            family("picker_log_entries_total", [((result,), count) for result, count in picker.entries.items()]),
            family("access_denied_total", list(self.denials().items())),
            family("traces_total", [((result,), count) for result, count in self.traces().items()]),
            family("audit_lines_total", [((kind,), written) for kind, (written, _) in self.audit().items()]),
            family("audit_lost_total", [((kind,), lost) for kind, (_, lost) in self.audit().items()]),
            *_declared_families(self.declared()),
            *_wear_families(self.wear()),
            family("backend_weights_differ", [((backend,), 1) for backend in self.differing()]),
            *found,
        ]

    # Events.

    def packed(self, key: str, report: PackReport) -> None:
        """Record how long a fetch and its packing took."""
        self._load_time.take(report.fetch_ns, "fetch")
        self._load_time.take(report.pack_ns, "pack")

    def checked(self, result: str, took_ns: int) -> None:
        """Record an external check; one that was not sent took no time."""
        self._checks.add(1, result)
        if took_ns:
            self._check_time.take(took_ns)

    def observed(self, event: ev.Event, effects: Sequence[do.Effect], now_ns: int) -> None:
        self._steps += 1
        take = _EVENTS.get(type(event))
        if take is not None:
            take(self, event, now_ns)
        for effect in effects:
            if isinstance(effect, do.Settle) and not goes_on(event, effect):
                self._ended(effect)
            note = _EFFECTS.get(type(effect))
            if note is not None:
                note(self, effect, now_ns)
        if isinstance(event, ev.BackendRemoved):  # last: the step itself may have counted something for it
            self._backend_removed(event.backend)

    def _backend_removed(self, backend: str) -> None:
        """End the series of a backend that is gone: names of pods are never used again."""
        self._loads = {load: held for load, held in self._loads.items() if held[0] != backend}
        self._load_results.end(backend)
        self._heals.end(backend)
        self.model_server.removed(backend)

    def _measured(self, event: ev.BackendMeasured, now_ns: int) -> None:
        self.model_server.measured(event.backend, event.kv_used)

    def _received(self, event: ev.Received, now_ns: int) -> None:
        request = self._core.state.requests.get(event.request)
        if request is None:
            self._refused_before_core = event.request
            return
        bound_ns = self._bound_ns(request)
        self._waiting[event.request] = bound_ns
        if bound_ns is not None:
            self._wait_bound.take(bound_ns, request.view.klass)

    def _had_first_token(self, event: ev.FirstToken, now_ns: int) -> None:
        request = self._core.state.requests.get(event.request)
        if request is None or request.attempt != event.attempt or event.request not in self._waiting:
            return
        promised_ns = self._waiting.pop(event.request)
        waited_ns = now_ns - request.view.arrived_ns + self.waited_ns.get(event.request, 0)
        self._first_token.take(waited_ns, request.view.klass)
        if promised_ns is not None:
            self._judge(waited_ns <= promised_ns, request.view.klass, self._tenants.label(request.view.tenant))
        self._check_bound(event.request, waited_ns, self._bound_ns(request))

    def _bound_ns(self, request: Request) -> int | None:
        """Return the promised longest wait, from the arrival at the first replica."""
        earlier_ns = self.waited_ns.get(request.id, 0)
        return None if request.promise is None else request.promise.bound_ns + earlier_ns

    def _check_bound(self, request: int, waited_ns: int, bound_ns: int | None) -> None:
        if bound_ns is not None and waited_ns > bound_ns:
            self._exceeded.add(1)
            logger.warning(
                "request %d waited %.2f s, and had been promised %.2f s: a bound that holds was broken; please report "
                "it with a capture (sidecar capture)",
                request,
                waited_ns / 1e9,
                bound_ns / 1e9,
            )

    def _judge(self, kept: bool, klass: str, tenant: str) -> None:
        for each in (True, False):  # both are there from the first on, so that a share of them can be computed
            self._bounds.add(each is kept, klass, tenant, str(each).lower())

    def _unregistered(self, event: ev.AdapterUnregistered, now_ns: int) -> None:
        if self._adapters.forget(event.name):
            self._adapter_requests.end(event.name)
            self._adapter_wait.end(event.name)
            self._tokens.end(event.name)

    def _fetched(self, event: ev.Fetched, now_ns: int) -> None:
        self._fetch_results.add(1, "ok")

    def _fetch_failed(self, event: ev.FetchFailed, now_ns: int) -> None:
        self._fetch_results.add(1, "failed")

    def _load_done(self, event: ev.LoadDone, now_ns: int) -> None:
        load = self._loads.pop(event.load, None)
        if load is not None:
            backend, begun_ns = load
            self._load_time.take(now_ns - begun_ns, "load")
            self.model_server.loaded(backend, now_ns - begun_ns)
            self._load_results.add(1, backend, "ok")

    def _load_failed(self, event: ev.LoadFailed, now_ns: int) -> None:
        load = self._loads.pop(event.load, None)
        if load is not None:
            self._load_results.add(1, load[0], "failed")

    def _backend_lost(self, event: ev.BackendLost, now_ns: int) -> None:
        """Count its loads as failed: they end with it without an event of their own."""
        self.model_server.lost(event.backend)
        for load in [load for load, (backend, _) in self._loads.items() if backend == event.backend]:
            del self._loads[load]
            self._load_results.add(1, event.backend, "failed")

    # Effects.

    def _load(self, effect: do.Load, now_ns: int) -> None:
        self._loads[effect.load] = (effect.backend, now_ns)

    def _dispatch(self, effect: do.Dispatch, now_ns: int) -> None:
        self._dispatched[effect.request] = None
        self._dispatches.add(1, effect.cache.value)

    def _heal(self, effect: do.Heal, now_ns: int) -> None:
        self._heals.add(1, effect.backend, effect.reason)

    def _quarantine(self, effect: do.Quarantine, now_ns: int) -> None:
        self._quarantines.add(1)

    def _ended(self, effect: do.Settle) -> None:
        """Count the end of a request. Of one that goes on at another replica, that replica counts it."""
        outcome, adapter, tenant = effect.outcome.value, self.adapter_label(effect.name), self._tenant_label(effect)
        self._requests.add(1, outcome)
        self._adapter_requests.add(1, adapter, outcome)
        self._class_requests.add(1, effect.klass, outcome)
        self._tenant_requests.add(1, tenant, outcome)
        reason = effect.reason
        if effect.outcome is Outcome.REFUSED and reason is not None and reason is not Reason.UNAUTHENTICATED:
            self._tenant_refusals.add(1, tenant, reason.name)
        if effect.request not in (0, self._refused_before_core):
            self._queue_wait.take(effect.queue_ns, effect.klass)
            for series, kind, label in (
                (self._tenant_wait, "tenant", tenant),
                (self._adapter_wait, "adapter", adapter),
            ):
                series.take(effect.queue_ns, label)
                self._folded.add(label == OTHER, kind)
        if self._was_sent(effect):
            if (adapter, tenant, "input") not in self._tokens and len(self._tokens) >= TOKEN_SERIES_MAX:
                tenant = OTHER
            self._tokens.add(effect.input_tokens, adapter, tenant, "input")
            self._tokens.add(effect.output_tokens, adapter, tenant, "output")

    def _settle(self, effect: do.Settle, now_ns: int) -> None:
        if effect.request in self._waiting:  # it had no token, so its wait is known up to its dispatch
            promised_ns = self._waiting.pop(effect.request)
            self._check_bound(effect.request, effect.queue_ns, effect.bound_ns)
            if promised_ns is not None and (effect.outcome is Outcome.OK or effect.queue_ns >= promised_ns):
                kept = effect.outcome is Outcome.OK and effect.queue_ns <= promised_ns
                self._judge(kept, effect.klass, self._tenant_label(effect))
        self._dispatched.pop(effect.request, None)

    def _was_sent(self, effect: do.Settle) -> bool:
        """Return True if an engine had a request: one of this replica, or one of an owner that was lost with it."""
        return effect.request in self._dispatched or effect.output_tokens > 0

    def _tenant_label(self, effect: do.Settle) -> str:
        """Return the label of a request's tenant. One of which no request was sent gets none: it may be invented."""
        if self._was_sent(effect) or (effect.tenant in self._tenants and effect.reason is not Reason.UNAUTHENTICATED):
            return self._tenants.label(effect.tenant)
        return OTHER

    def used(self, tenant: str, seat_ns: int) -> None:
        """Record seat time of a tenant, by its name in the rows of usage."""
        label = OTHER if tenant == OTHERS else self._tenants.label(tenant_of(tenant))
        self._tenant_seats.add(seat_ns / 1e9, label)

    def adapter_label(self, name: str) -> str:
        """Return the label of a name: the name itself only while it is registered, since clients may send anything."""
        if name in self._adapters:
            return name
        if not name:
            return BASE_MODEL
        return self._adapters.label(name) if name in self._core.state.names else OTHER


def _declared_families(phases: Mapping[str, int]) -> list[Family]:
    """Return the figures of declared adapters, empty phases included."""
    return [
        family("declared_adapters", [((phase,), phases.get(phase, 0)) for phase in DECLARED_PHASES]),
        family("declared_held", [((), phases.get("Held", 0))]),
    ]


def _wear_families(wear: Mapping[str, Wear]) -> list[Family]:
    limits = [((backend,), known.limit) for backend, known in wear.items() if known.limit is not None]
    return [
        family("backend_versions_kept", [((backend,), known.versions) for backend, known in wear.items()]),
        family("backend_versions_max", limits),
    ]


_EVENTS: dict[type, Callable[[Metrics, Any, int], None]] = {
    ev.Received: Metrics._received,
    ev.AdapterUnregistered: Metrics._unregistered,
    ev.Fetched: Metrics._fetched,
    ev.FetchFailed: Metrics._fetch_failed,
    ev.FirstToken: Metrics._had_first_token,
    ev.LoadDone: Metrics._load_done,
    ev.LoadFailed: Metrics._load_failed,
    ev.BackendLost: Metrics._backend_lost,
    ev.BackendMeasured: Metrics._measured,
}
_EFFECTS: dict[type, Callable[[Metrics, Any, int], None]] = {
    do.Load: Metrics._load,
    do.Dispatch: Metrics._dispatch,
    do.Heal: Metrics._heal,
    do.Quarantine: Metrics._quarantine,
    do.Settle: Metrics._settle,
}
