"""vLLM's metrics. Like the real ones they change when a step ends or requests leave, not when they are scraped.

`vllm:lora_requests_info` has one series for each combination of labels that ever occurred, with the time at which it
last held. Both lists name the adapters of requests that have begun to answer; waiting requests and adapters that only
hold a slot are not reported. A request whose client left counts as no kind of ending.

The Rust front end tells neither the number of slots nor the KV cache's size nor when it was started.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sidecar.lab.engine.http.prefix import PrefixCache
from sidecar.lab.engine.openai.work import SequenceWork
from sidecar.lab.engine.spec import EngineSpec

CONTENT_TYPE = CONTENT_TYPE_LATEST
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_REASONS = ("stop", "length", "abort", "error")


@dataclass(frozen=True)
class Scheduled:
    """Requests in the engine: running, waiting for space, and waiting for an adapter's slot."""

    running: int
    waiting: int
    deferred: int
    adapters: tuple[str, ...]
    kv_usage: float


class Metrics:
    """All metric families of one server."""

    def __init__(self, model: str, spec: EngineSpec, is_rust: bool = False, has_lora: bool = True) -> None:
        self._is_rust = is_rust
        self._registry = CollectorRegistry()
        self._labels = {"engine": "0", "model_name": model}
        self._max_lora = str(spec.device_pages)
        self._running = self._gauge("num_requests_running", "Number of requests in model execution batches.")
        self._waiting = self._gauge("num_requests_waiting", "Number of requests waiting to be processed.")
        self._by_reason = self._raw(Gauge, "num_requests_waiting_by_reason", "Waiting requests by reason.", "reason")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")
        self._prompt_tokens = self._counter("prompt_tokens", "Number of prefill tokens processed.")
        self._generated = self._counter("generation_tokens", "Number of generation tokens processed.")
        self._queries = self._counter("prefix_cache_queries", "Prefix cache queries, in tokens.")
        self._hits = self._counter("prefix_cache_hits", "Prefix cache hits, in tokens.")
        self._success = self._raw(Counter, "request_success", "Finished requests.", "finished_reason")
        self._steps = self._histogram("iteration_tokens_total", "Tokens per engine step.", _STEP_TOKENS)
        self._first = self._histogram("time_to_first_token_seconds", "Time to first token.", _SECONDS)
        self._whole = self._histogram("e2e_request_latency_seconds", "Request latency.", _SECONDS)
        self._loras = Gauge(
            "vllm:lora_requests_info",
            "Running stats on lora requests.",
            ("running_lora_adapters", "waiting_lora_adapters")
            if is_rust
            else ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
            registry=self._registry if has_lora else CollectorRegistry(),
        )
        self._looked_up = self._found = 0
        if not is_rust:
            self._say_constants(spec)
        for reason in ("capacity", "deferred"):
            self._by_reason.labels(**self._labels, reason=reason).set(0)
        for reason in _REASONS:
            self._success.labels(**self._labels, finished_reason=reason)

    def stepped(self, outputs: int, context_tokens: int, prefix: PrefixCache[Any], scheduled: Scheduled) -> None:
        """Account for a step; only one with output is counted."""
        self._queries.inc(prefix.queries - self._looked_up)
        self._hits.inc(prefix.hits - self._found)
        self._looked_up, self._found = prefix.queries, prefix.hits
        if outputs:
            self._steps.observe(context_tokens + outputs)
            self._generated.inc(outputs)
        if outputs or context_tokens:
            self._prompt_tokens.inc(context_tokens)
            self.scheduled(scheduled)

    def scheduled(self, scheduled: Scheduled) -> None:
        """Set the gauges of running and waiting requests."""
        self._running.set(scheduled.running)
        self._waiting.set(scheduled.waiting + scheduled.deferred)
        self._by_reason.labels(**self._labels, reason="capacity").set(scheduled.waiting)
        self._by_reason.labels(**self._labels, reason="deferred").set(scheduled.deferred)
        self._kv_usage.set(scheduled.kv_usage)
        names = ",".join(scheduled.adapters)
        if not self._is_rust:
            self._loras.labels(self._max_lora, names, names).set_to_current_time()
        elif names:
            self._loras.labels(names, "").set_to_current_time()

    def ended(self, work: SequenceWork, reason: str) -> None:
        """Count a request that has its last token."""
        self._success.labels(**self._labels, finished_reason=reason).inc()
        self._first.observe((work.first_token_ns - work.arrival_ns) / 1e9)
        self._whole.observe((work.last_token_ns - work.arrival_ns) / 1e9)

    def scrape(self) -> bytes:
        """Return the text format."""
        return generate_latest(self._registry)

    def _say_constants(self, spec: EngineSpec) -> None:
        started = Gauge(
            "process_start_time_seconds",
            "Start time of the process since unix epoch in seconds.",
            registry=self._registry,
        )
        started.set_to_current_time()
        facts = {
            "block_size": str(spec.tokens_per_block),
            "cache_dtype": "auto",
            "enable_prefix_caching": "True",
            "engine": "0",
            "kv_cache_size_tokens": str(spec.kv_blocks * spec.tokens_per_block),
            "num_gpu_blocks": str(spec.kv_blocks),
            "prefix_caching_hash_algo": "sha256",
        }
        info = Gauge(
            "vllm:cache_config_info", "Information of the LLMEngine CacheConfig", list(facts), registry=self._registry
        )
        info.labels(**facts).set(1)

    def _raw(self, kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
        return kind(f"vllm:{name}", text, (*self._labels, *labels), registry=self._registry, **options)

    def _gauge(self, name: str, text: str) -> Gauge:
        made: Gauge = self._raw(Gauge, name, text).labels(**self._labels)
        return made

    def _counter(self, name: str, text: str) -> Counter:
        made: Counter = self._raw(Counter, name, text).labels(**self._labels)
        return made

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made: Histogram = self._raw(Histogram, name, text, buckets=buckets).labels(**self._labels)
        return made
