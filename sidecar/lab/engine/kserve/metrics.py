"""The engine's gauges on Triton's metrics port, read when they are scraped.

Families and labels are those of `triton_metrics.cc` and `custom_metrics_reporter.cc`. As in every version read, none
shows the LoRA caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from sidecar.lab.engine.engine import Engine
from sidecar.lab.engine.kserve.models import CORE
from sidecar.lab.engine.messages import Counters

_MODEL = (CORE, "1")


class EngineGauges(Collector):
    """The nv_trt_llm_* families of the engine that `written_by` returns.

    Their labels name the model but not its instance, so with several instances the last writer's values stand.
    """

    def __init__(self, written_by: Callable[[], Engine]) -> None:
        self._written_by = written_by

    def describe(self) -> Iterable[Metric]:
        """Return nothing: families are only known by collecting them, which needs no registration check."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the families with the engine's numbers of this moment."""
        engine = self._written_by()
        counters, spec = engine.counters, engine.spec
        yield _family("nv_trt_llm_request_metrics", "request_type", _requests(counters, spec.max_batch_size))
        yield _family(
            "nv_trt_llm_kv_cache_block_metrics",
            "kv_cache_block_type",
            _blocks(counters, spec.tokens_per_block),
        )
        yield _family("nv_trt_llm_runtime_memory_metrics", "memory_type", {"cpu": 0, "gpu": 0, "pinned": 0})
        yield _family("nv_trt_llm_inflight_batcher_metrics", "inflight_batcher_specific_metric", _batcher(counters))
        yield _family(
            "nv_trt_llm_general_metrics",
            "general_type",
            {"timestamp": int(time.time()), "iteration_counter": counters.iteration_counter},
        )


class MetricsServer:
    """An HTTP server in its own thread that serves the gauges; with None it has none."""

    def __init__(self, written_by: Callable[[], Engine] | None, host: str, port: int) -> None:
        registry = CollectorRegistry()
        if written_by is not None:
            registry.register(EngineGauges(written_by))
        self._server: Any
        self._server, self._thread = start_http_server(port, host, registry)
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _family(name: str, label: str, numbers: dict[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, f"TRT LLM {label} statistics", labels=("model", "version", label))
    for value, number in numbers.items():
        family.add_metric((*_MODEL, value), number)
    return family


def _requests(counters: Counters, seats: int) -> dict[str, float]:
    return {
        "active": counters.active,
        "max": seats,
        "scheduled": counters.scheduled,
        "context": counters.context,
        # The backend reports active minus scheduled here, not the executor's queue.
        "waiting": counters.active - counters.scheduled,
    }


def _blocks(counters: Counters, tokens_per_block: int) -> dict[str, float]:
    return {
        "max": counters.kv_max_blocks,
        "free": counters.kv_free_blocks,
        "used": counters.kv_used_blocks,
        "tokens_per": tokens_per_block,
        "reused": 0,
        "fraction": counters.kv_used_blocks / counters.kv_max_blocks if counters.kv_max_blocks else 0.0,
    }


def _batcher(counters: Counters) -> dict[str, float]:
    return {
        "total_context_tokens": counters.context_tokens,
        "generation_requests": counters.generation,
        "micro_batch_id": 0,
        "paused_requests": counters.paused,
    }
