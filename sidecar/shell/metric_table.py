"""The metrics contract: every family on `/metrics`, with its labels. docs/metrics.md is generated from it.

Only a bounded number of adapters and tenants get a label, the rest `_other`; a label that is given is kept until its
adapter is unregistered. So the number of series does not grow with what clients send.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Literal

PREFIX = "lora_sidecar_"
VLLM = "vllm:"
"""Prefix of the names that vLLM has."""
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
    prefix: str = PREFIX

    @property
    def name(self) -> str:
        return self.prefix + self.short


def _counter(short: str, help: str, *labels: str) -> Metric:  # noqa: A002 — Prometheus's own word
    return Metric(short, "counter", labels, help)


def _gauge(short: str, help: str, *labels: str) -> Metric:  # noqa: A002
    return Metric(short, "gauge", labels, help)


def _vllm(short: str, help: str, *labels: str) -> Metric:  # noqa: A002
    return Metric(short, "gauge", labels, help, VLLM)


def _histogram(short: str, help: str, *labels: str) -> Metric:  # noqa: A002
    return Metric(short, "histogram", labels, help)


_WAIT = "Time from arrival to dispatch, or to the end of a request that was never sent"
_REQUESTS = (
    _counter("requests_total", "Requests that ended, by outcome.", "outcome"),
    _counter("adapter_requests_total", "Requests that ended, by adapter and outcome.", "adapter", "outcome"),
    _counter(
        "tokens_total",
        "Tokens of requests that reached an engine: of prompts (input) and of answers (output).",
        "adapter",
        "tenant",
        "direction",
    ),
    _counter("class_requests_total", "Requests that ended, by class and outcome.", "class", "outcome"),
    _counter("tenant_requests_total", "Requests that ended, by tenant and outcome.", "tenant", "outcome"),
    _counter(
        "tenant_refusals_total",
        "Requests that were refused, by tenant and reason; those without a valid credential are none.",
        "tenant",
        "reason",
    ),
    _counter(
        "tenant_seat_seconds_total",
        "Seconds from dispatch to end, times the sequences of a request; counted each minute while it runs.",
        "tenant",
    ),
    _histogram("queue_wait_seconds", f"{_WAIT}.", "class"),
    _histogram("tenant_wait_seconds", f"{_WAIT}, by tenant.", "tenant"),
    _histogram("adapter_wait_seconds", f"{_WAIT}, by adapter.", "adapter"),
    _counter("waits_folded_total", "Waits that were counted under _other, by label: adapter or tenant.", "label"),
    _histogram("first_token_seconds", "Time from arrival to the first token of a streamed answer.", "class"),
    _histogram(
        "wait_bound_seconds",
        "Promised time to the first token of an admitted request, if it had a promise.",
        "class",
    ),
    _counter(
        "wait_bounds_total",
        "Promises that are over, by whether the first token came in time. A promise that became void is judged, too.",
        "class",
        "tenant",
        "kept",
    ),
    _counter("wait_bounds_voided_total", "Promises that became void, by the lost precondition.", "reason"),
    _counter(
        "wait_bounds_exceeded_total",
        "Waits that were longer than a promise that was not void: a bug of the sidecar.",
    ),
    _gauge(
        "predicted_wait_seconds",
        "Predicted wait of a request that comes now, behind all that is queued; no sample while it is unknown.",
        "backend",
    ),
    _gauge(
        "longest_promised_wait_seconds",
        "Longest promise of those that wait; 0 if nobody waits, and no sample if none of them has a promise.",
    ),
    _counter("dispatches_total", "Dispatches, by where the adapter was.", "cache"),
    _gauge("queued_requests", 'Waiting requests by backend; backend "" means none at the moment.', "backend"),
    _gauge(
        "waiting_requests",
        "Waiting requests by reason; the first request of an adapter at a backend stands for all.",
        "why",
    ),
    _gauge("queued_tokens", "Prompt tokens and largest answers of the waiting requests."),
)
_ADAPTERS = (
    _gauge("adapters_registered", "Registered names."),
    _gauge("adapters_set_aside", "Names that are not served because their stored records cannot be used."),
    _gauge("adapters_quarantined", "Versions that are refused until a person releases them."),
    _counter("quarantines_total", "Versions that were quarantined."),
    _gauge(
        "store_bytes",
        "Bytes that the host store holds or has reserved for fetches, without the memory kept of dropped adapters.",
        "tier",
    ),
    _gauge("store_budget_bytes", "Bytes that the host store may hold.", "tier"),
    _gauge("store_adapters", "Packed adapters that the host store holds.", "tier"),
    _counter("store_evictions_total", "Packed adapters that the host store evicted for others.", "tier"),
    _counter("fetches_total", "Fetches that ended, by result: ok or failed.", "result"),
    _counter(
        "prefetches_total",
        "Versions prefetched before a request waited for them: to the store or to an engine.",
        "to",
    ),
    _counter("prefetches_used_total", "Prefetches that a request used.", "to"),
    _counter("prefetches_late_total", "Used prefetches for which a request waited nevertheless.", "to"),
    _counter("prefetch_wasted_bytes_total", "Bytes of prefetches that no request used.", "to"),
)
# As the replica that leads tells of them.
_DECLARED = (
    _gauge(
        "declared_adapters",
        "Adapters that the cluster declares, by phase; 0 on a replica that does not lead.",
        "phase",
    ),
    _gauge("declared_held", "Declared adapters that an operator holds at another version."),
)
_BACKENDS = (
    _histogram("load_seconds", "Time to bring an adapter in, by phase: fetch, pack or load.", "phase"),
    _counter("loads_total", "Loads that ended, by result: ok or failed.", "backend", "result"),
    _gauge("loads_running", "Loads in flight.", "backend"),
    _counter("heals_total", "Wrong beliefs and faults mended before the first token.", "backend", "reason"),
    _gauge("resident", "Versions believed to be in an engine's adapter cache: gpu or engine_host.", "backend", "tier"),
    _gauge(
        "backend_versions_kept",
        "Adapter versions that an engine keeps in memory until it is restarted; no sample for engines that free them.",
        "backend",
    ),
    _gauge("backend_versions_max", "Adapter versions that an engine may keep; no sample without a limit.", "backend"),
    _gauge(
        "backend_weights_differ",
        "1 for an engine that answered one question otherwise than before, or than others of its base model.",
        "backend",
    ),
    _gauge("open_adapters", "Versions that hold a slot.", "backend"),
    _gauge(
        "slots",
        "Room for adapters in an engine's GPU: adapters, or pages of TensorRT-LLM's cache; no sample while unknown.",
        "backend",
    ),
    _gauge(
        "slots_needed",
        "Slots that the adapters of running and waiting requests need, more than there are if some wait for one.",
        "backend",
    ),
    _gauge("running_requests", "Requests in flight.", "backend"),
    _gauge("seats", "Requests and Loads that may be in flight.", "backend"),
    _gauge("backend_up", "1 if a backend answers.", "backend"),
    _gauge("backend_draining", "1 if a backend takes no new requests.", "backend"),
    _gauge("backend_stalled", "1 if a backend gets no new requests because it is silent.", "backend"),
    _gauge("backend_joining", "1 if a backend has just come up and is spared until it is warm.", "backend"),
)
# One that is alone owns every backend, under epoch 0.
_REPLICAS = (
    _gauge("backend_owned", "1 if this replica has a backend's queue.", "backend"),
    _gauge("backend_epoch", "The epoch under which this replica last owned a backend.", "backend"),
    _counter("ownership_changes_total", "Backends that this replica took or gave up.", "change"),
    _counter("forwards_total", "Requests forwarded to the owner of their backend."),
    _counter("reroutes_total", "Forwarded requests that came back without a token and were sent again."),
    _counter("unowned_total", "Requests refused because no replica owned a backend for them."),
    _gauge("replicas", "Replicas that are alive, as far as this one knows."),
    _gauge("state_lag_changes", "Changes of names in the registry that this replica has not read."),
    _gauge("state_away_seconds", "Seconds since the shared state stopped answering; 0 while it answers."),
)
_ACCESS = (
    _counter(
        "access_denied_total",
        "Calls and requests that were denied, by cause: unauthenticated, not_permitted or limit; observed if they were "
        "let pass because identity.mode is observe.",
        "cause",
        "observed",
    ),
    _gauge("access_state_away_seconds", "Time since which the keys and limits in Redis could not be read."),
    _counter(
        "external_checks_total",
        "External checks of calls (identity.external), by result: ok, denied, or failed, which refuses a call, too.",
        "result",
    ),
    _histogram("external_check_seconds", "Time until an external check had its answer, or failed."),
    _counter("audit_lines_total", "Lines written to the audit, by kind: change or denial.", "kind"),
    _counter("audit_lost_total", "Changes and denials that could not be recorded in the audit.", "kind"),
    _gauge("policy_epoch", "Policies that have decided so far: 1, and 1 more for each change of their file."),
    _gauge(
        "policy_faulty", "1 while the file of policies is faulty, so that those that were read before still decide."
    ),
)
_PROCESS = (
    _gauge(
        "open_calls",
        "Open requests: of clients, whichever replica answers, and those forwarded by other replicas.",
    ),
    _gauge("arriving_bytes", "Known bytes of messages that have not come in full."),
    _counter(
        "arrivals_refused_total",
        "Messages and calls refused on arrival: budget (exceeded), late, calls (too many on a connection).",
        "why",
    ),
    _gauge(
        "picker_requests",
        "Requests of gateways: held, sent to an engine, answering through the sidecar, or unseen (past it).",
        "where",
    ),
    _counter(
        "picker_log_entries_total",
        "Entries of gateways' access logs: used, passed_on to the replica that they are for, or unknown.",
        "result",
    ),
    _counter("picker_elsewhere_total", "Answers that came from another engine than the one that was picked."),
    _counter("steps_total", "Events that the core has taken."),
    _gauge("event_loop_stall_seconds", "Longest stall of the event loop since the last scrape."),
    _gauge("draining", "1 if the sidecar admits no new requests."),
    _counter("journal_bytes_total", "Bytes written to the journal."),
    _counter("journal_gaps_total", "Times that the journal left out steps and began a new segment."),
    _counter("journal_errors_total", "Failures to write the journal."),
    _counter(
        "traces_total",
        "Traces of requests, by what became of them: sent, failed (not received), or dropped (too many at once).",
        "result",
    ),
    _gauge("config_last_reload_successful", "1 unless the configuration could not be read again the last time."),
    _gauge("config_last_reload_success_timestamp_seconds", "When the configuration in force was read."),
    _counter("usage_errors_total", "Writes of usage that failed; they are tried again."),
    _gauge("build_info", "Always 1; the label is the running version.", "version"),
)
GROUPS: dict[str, tuple[Metric, ...]] = {
    "Requests": _REQUESTS,
    "Adapters and the host store": _ADAPTERS,
    "Adapters that a cluster declares": _DECLARED,
    "Backends": _BACKENDS,
    "Replicas": _REPLICAS,
    "Access": _ACCESS,
    "The process": _PROCESS,
}
"""Every family on `/metrics`, by what it is about."""
METRICS = tuple(chain.from_iterable(GROUPS.values()))
_OF_POOL, _OF_ENGINE = ("model_name",), ("engine", "model_name")
MODEL_SERVER: tuple[Metric, ...] = (
    _vllm("num_requests_waiting", "Requests that wait here for an engine.", *_OF_POOL),
    _vllm("num_requests_running", "Requests in flight at the engines.", *_OF_POOL),
    _vllm(
        "kv_cache_usage_perc",
        "KV cache in use at the engines, from 0 to 1; no sample unless each engine that is up tells it.",
        *_OF_POOL,
    ),
    _vllm(
        "lora_requests_info",
        "When this was told, in seconds since 1970. Labels have the adapters in the GPUs' memory, the others that "
        "requests wait for, and how many there is room for, empty while that is unknown. On its way out in vLLM.",
        *(*_OF_POOL, "max_lora", "running_lora_adapters", "waiting_lora_adapters"),
    ),
    _vllm(
        "lora_adapter_loaded",
        "1 for each adapter in an engine's memory. Level gpu: used at once; cpu: in the host's memory only. Its rank "
        "is the largest of its modules.",
        *(*_OF_ENGINE, "adapter_name", "level", "pinned", "rank"),
    ),
    _vllm("num_gpu_loaded_lora_adapters", "Adapter versions in the GPU's memory.", *_OF_ENGINE),
    _vllm(
        "num_cpu_loaded_lora_adapters",
        "Adapter versions in the engine's host memory, with those that are also in the GPU's; no sample while its size "
        "is only assumed.",
        *_OF_ENGINE,
    ),
    _vllm(
        "max_gpu_lora_adapters",
        "Adapters for which the GPU has room, of the size of the largest there; no sample while that is unknown.",
        *_OF_ENGINE,
    ),
    Metric(
        "lora_adapter_load_seconds",
        "histogram",
        (*_OF_ENGINE, "transition"),
        "Time that an engine took for a load; transition is always load.",
        VLLM,
    ),
)
"""Every family on `/metrics/model-server`; `docs/pickers.md` has the sources of names, types and labels."""
BY_SHORT: dict[str, Metric] = {metric.short: metric for metric in (*METRICS, *MODEL_SERVER)}


class LabelValues:
    """Give the first `count_max` values a label of their own, and the rest `_other`.

    `known` values have a label from the start, in addition, which no early comer can take.
    """

    def __init__(self, count_max: int, known: Iterable[str] = ()) -> None:
        self._values: dict[str, None] = dict.fromkeys(known)
        self._count_max = count_max + len(self._values)

    def __contains__(self, value: str) -> bool:
        return value in self._values

    def label(self, value: str) -> str:
        if value in self._values:
            return value
        if len(self._values) >= self._count_max:
            return OTHER
        self._values[value] = None
        return value

    def forget(self, value: str) -> bool:
        """Free a value's label; return False if it had none."""
        if value not in self._values:
            return False
        del self._values[value]
        return True
