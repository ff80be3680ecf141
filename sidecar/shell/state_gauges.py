"""Gauges that are read from the core's state on request, not kept up to date step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family

from policies.views import BASE
from sidecar.core import eligibility, promising
from sidecar.core.enums import Phase
from sidecar.core.prefetch_accounting import PrefetchCounts
from sidecar.core.state import Backend, State
from sidecar.core.store import StoreIndex
from sidecar.journal.segments import product_version
from sidecar.shell.metric_table import BY_SHORT

Samples = Iterable[tuple[tuple[str, ...], float]]


def families_of(state: State, now_ns: int) -> list[Family]:
    """Return the families that depend on the state alone. Call it between steps."""
    reasons = eligibility.reasons_to_wait(state, now_ns).items()
    return [
        family("waiting_requests", [((why.value,), count) for why, count in reasons]),
        *(family(short, read(state)) for short, read in READERS.items()),
    ]


def family(short: str, samples: Samples) -> Family:
    """Return a family of the contract with its samples."""
    metric = BY_SHORT[short]
    make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    made: CounterMetricFamily | GaugeMetricFamily = make(metric.name, metric.help, labels=metric.labels)
    for labels, value in samples:
        made.add_metric(labels, value)
    return made


def _one(value: float) -> Samples:
    return [((), value)]


def _each_backend(value_of: Callable[[Backend], float]) -> Callable[[State], Samples]:
    return lambda state: [((backend.id,), value_of(backend)) for backend in state.backends.values()]


def _tiers(state: State, value_of: Callable[[StoreIndex], float]) -> Samples:
    return [(("memory",), value_of(state.store)), (("disk",), value_of(state.disk))]


def _prefetched(value_of: Callable[[PrefetchCounts], float]) -> Callable[[State], Samples]:
    return lambda state: [
        (("store",), value_of(state.guesses.counts)),
        (
            ("engine",),
            value_of(state.ahead_of_removed)
            + sum(value_of(backend.ahead.counts) for backend in state.backends.values()),
        ),
    ]


def _queued(state: State) -> Samples:
    yield ("",), len(state.unrouted)
    yield from _each_backend(lambda backend: len(backend.queued))(state)


def _voided(state: State) -> Samples:
    return [((reason.value,), count) for reason, count in state.voided.items()]


def _predicted_waits(state: State) -> Samples:
    """Yield the known waits. An engine whose pace is a guess has no sample: 0 would mean that nobody waits."""
    for backend in state.backends.values():
        wait_ns = promising.wait_ns(state, backend)
        if wait_ns is not None:
            yield (backend.id,), wait_ns / 1e9


def _resident(state: State) -> Iterator[tuple[tuple[str, ...], float]]:
    for backend in state.backends.values():
        device = backend.shadow.device.held
        yield (backend.id, "gpu"), len(device)
        yield (backend.id, "engine_host"), sum(version not in device for version in backend.shadow.host.held)


def _of_slots(value_of: Callable[[State, Backend, int], float]) -> Callable[[State], Samples]:
    """Read a value from each engine of ours whose slots are known rather than estimated, given their number."""

    def read(state: State) -> Samples:
        for backend in state.backends.values():
            is_known = backend.facts.device_pages is not None and not backend.facts.base_only
            if is_known and backend.owned and backend.phase is Phase.UP:
                yield (backend.id,), value_of(state, backend, eligibility.page_limit(backend))

    return read


def _slots_needed(state: State, backend: Backend, slots: int) -> float:
    waiting = (version for version in backend.queued_by_version if version != BASE and version not in backend.slots)
    return backend.busy_pages + sum(state.packed_for(version, backend).pages for version in waiting)


READERS: dict[str, Callable[[State], Samples]] = {
    "queued_requests": _queued,
    "queued_tokens": lambda state: _one(state.waiting.tokens),
    "wait_bounds_voided_total": _voided,
    "predicted_wait_seconds": _predicted_waits,
    "adapters_registered": lambda state: _one(len(state.names)),
    "adapters_quarantined": lambda state: _one(sum(bool(held.quarantined) for held in state.versions.values())),
    "store_bytes": lambda state: _tiers(state, lambda store: store.bytes_used),
    "store_budget_bytes": lambda state: _tiers(state, lambda store: store.budget_bytes),
    "store_adapters": lambda state: _tiers(state, lambda store: len(store.entries) - store.fetches),
    "store_evictions_total": lambda state: _tiers(state, lambda store: store.evictions),
    "prefetches_total": _prefetched(lambda counts: counts.begun),
    "prefetches_used_total": _prefetched(lambda counts: counts.used),
    "prefetches_late_total": _prefetched(lambda counts: counts.late),
    "prefetch_wasted_bytes_total": _prefetched(lambda counts: counts.wasted_bytes),
    "loads_running": _each_backend(lambda backend: len(backend.loads)),
    "resident": _resident,
    "open_adapters": _each_backend(lambda backend: len(backend.slots)),
    "slots": _of_slots(lambda state, backend, slots: slots),
    "slots_needed": _of_slots(_slots_needed),
    "running_requests": _each_backend(lambda backend: len(backend.running)),
    "seats": lambda state: _each_backend(lambda backend: backend.seats(state.config))(state),
    "backend_up": _each_backend(lambda backend: backend.phase is Phase.UP),
    "backend_draining": _each_backend(lambda backend: backend.draining or backend.leaving),
    "backend_stalled": _each_backend(lambda backend: backend.silence.suspected),
    "backend_joining": lambda state: _each_backend(lambda backend: backend.id in state.joining)(state),
    "backend_owned": _each_backend(lambda backend: backend.owned),
    "backend_epoch": _each_backend(lambda backend: backend.epoch),
    "draining": lambda state: _one(state.draining),
    "build_info": lambda state: [((product_version(),), 1)],
}
