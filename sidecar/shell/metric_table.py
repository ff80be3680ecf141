"""The metrics contract: every family on `/metrics`, with its labels. docs/metrics.md is generated from it.

No histogram has an adapter label, and only a bounded number of adapters and tenants get a label, the rest `_other`. So
the number of series does not grow with what clients send.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "lora_sidecar_"
OTHER = "_other"
"""Label of adapters and tenants above the limit, and of unregistered names. No name begins with `_`."""
BASE_MODEL = "_base"
"""Adapter label of requests for the base model."""


@dataclass(frozen=True)
class Metric:
    """One family: its name without the common prefix, type, labels and meaning."""

    short: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str

    @property
    def name(self) -> str:
        return PREFIX + self.short


def _counter(short: str, help: str, *labels: str) -> Metric:  # noqa: A002 — Prometheus's own word
    return Metric(short, "counter", labels, help)


def _gauge(short: str, help: str, *labels: str) -> Metric:  # noqa: A002
    return Metric(short, "gauge", labels, help)


def _histogram(short: str, help: str, *labels: str) -> Metric:  # noqa: A002
    return Metric(short, "histogram", labels, help)


METRICS: tuple[Metric, ...] = (
    # Requests.
    _counter("requests_total", "Requests that ended, by how.", "outcome"),
    _counter("adapter_requests_total", "Requests that ended, by adapter and how.", "adapter", "outcome"),
    _counter(
        "tokens_total",
        "Tokens of requests that reached an engine: of prompts, and answered.",
        "adapter",
        "tenant",
        "direction",
    ),
    _histogram("queue_wait_seconds", "Time from arrival to dispatch, or to the ending of those never sent.", "class"),
    _histogram(
        "first_token_seconds", "Time from arrival to the first token, of answers that come token by token.", "class"
    ),
    _histogram(
        "wait_bound_seconds", "Time within which an admitted request was promised its first token, if it was.", "class"
    ),
    _counter("wait_bounds_voided_total", "Promises that became void, by what they rested on and is gone.", "reason"),
    _counter("wait_bounds_exceeded_total", "Waits that were longer than a promise that was not void: a bug of ours."),
    _gauge(
        "predicted_wait_seconds",
        "How long a request that comes now would wait; no sample while nobody knows.",
        "backend",
    ),
    _counter("dispatches_total", "Dispatches, by where the adapter came from.", "cache"),
    _gauge("queued_requests", 'Requests that wait, by backend; backend "" is none at the moment.', "backend"),
    _gauge(
        "waiting_requests", "Requests that wait, by why: the first of an adapter at a backend tells for all.", "why"
    ),
    _gauge("queued_tokens", "Prompt tokens and largest answers of the requests that wait."),
    # Adapters and the host store.
    _gauge("adapters_registered", "Names that are registered."),
    _gauge("adapters_set_aside", "Names that are not served because what is written down of them cannot be used."),
    _gauge("adapters_quarantined", "Versions that are refused until a person releases them."),
    _counter("quarantines_total", "Versions that were quarantined."),
    _gauge("store_bytes", "Bytes that the host store holds or has reserved for fetches.", "tier"),
    _gauge("store_budget_bytes", "Bytes that the host store may hold.", "tier"),
    _gauge("store_adapters", "Packed adapters that the host store holds.", "tier"),
    _counter("store_evictions_total", "Packed adapters that the host store gave up for others.", "tier"),
    _counter("fetches_total", "Fetches that ended, by result: ok or failed.", "result"),
    _counter(
        "prefetches_total", "Versions brought in before anybody waited for them: to the store, to an engine.", "to"
    ),
    _counter("prefetches_used_total", "Of these, how many a request used.", "to"),
    _counter("prefetches_late_total", "Of those used, for how many a request waited all the same.", "to"),
    _counter("prefetch_wasted_bytes_total", "Bytes of prefetches that nobody used.", "to"),
    # Adapters that a cluster declares, as the replica that leads tells of them.
    _gauge("declared_adapters", "Adapters that the cluster declares, by phase; 0 where this does not lead.", "phase"),
    _gauge("declared_held", "Of these, how many an operator holds at another version for now."),
    # Backends.
    _histogram("load_seconds", "Time to bring an adapter in, by phase: fetch, pack or load.", "phase"),
    _counter("loads_total", "Loads that ended, by result: ok or failed.", "backend", "result"),
    _gauge("loads_running", "Loads in flight.", "backend"),
    _counter("heals_total", "Wrong beliefs and faults mended at no client's cost.", "backend", "reason"),
    _gauge("resident", "Versions believed to be in an engine's adapter cache: gpu or engine_host.", "backend", "tier"),
    _gauge("open_adapters", "Versions that hold a slot.", "backend"),
    _gauge("running_requests", "Requests in flight.", "backend"),
    _gauge("seats", "Requests and Loads that may be in flight.", "backend"),
    _gauge("backend_up", "Whether a backend answers.", "backend"),
    _gauge("backend_draining", "Whether a backend takes nothing new.", "backend"),
    _gauge("backend_stalled", "Whether a backend is sent nothing new because nothing comes from it.", "backend"),
    _gauge("backend_joining", "Whether a backend that has just come up is spared until it is warm.", "backend"),
    # Replicas. One that is alone owns every backend, under epoch 0.
    _gauge("backend_owned", "Whether this replica has a backend's queue.", "backend"),
    _gauge("backend_epoch", "The epoch under which this replica owned a backend last.", "backend"),
    _counter("ownership_changes_total", "Backends that this replica took or gave up.", "change"),
    _counter("forwards_total", "Requests passed on to the owner of their backend."),
    _counter("reroutes_total", "Of those, how many came back without a token and were sent again."),
    _counter("unowned_total", "Requests that were refused because no replica that owns a backend for them was found."),
    _gauge("replicas", "Replicas that are alive, as far as this one knows."),
    _gauge("state_lag_changes", "Changes of names that are written down and that this replica has not read."),
    _gauge("state_away_seconds", "For how long the shared state has not answered; 0 while it does."),
    # The process.
    _gauge(
        "open_calls",
        "Requests that are open here: clients', whoever answers them, and those that other replicas pass on.",
    ),
    _gauge("arriving_bytes", "Bytes that are here of messages that have not come in full, as far as is known."),
    _counter(
        "arrivals_refused_total",
        "Messages and calls turned away on their way in: budget (was short), late, calls (too many of a connection).",
        "why",
    ),
    _counter("steps_total", "Events that the core has taken."),
    _gauge("event_loop_stall_seconds", "Longest stall of the event loop since the last scrape."),
    _gauge("draining", "Whether the sidecar admits nothing new."),
    _counter("journal_bytes_total", "Bytes written to the journal."),
    _counter("journal_gaps_total", "Times that the journal left steps out and began a new segment."),
    _counter("journal_errors_total", "Failures to write the journal."),
    _gauge("build_info", "Always 1; the label says which version runs.", "version"),
)
BY_SHORT: dict[str, Metric] = {metric.short: metric for metric in METRICS}
