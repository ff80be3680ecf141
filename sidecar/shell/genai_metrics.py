"""`gen_ai.server.*` of OpenTelemetry's conventions for generative AI, sent by OTLP.

It needs the extra `lora-sidecar[otel]`; only what is configured imports this file. Requests are recorded at their end.
The library adds up and sends from a thread of its own, once a minute unless the environment says otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import OTELResourceDetector, Resource

from sidecar.config.metrics import Otlp
from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.enums import Outcome
from sidecar.core.state import State
from sidecar.errors import Reason
from sidecar.journal.segments import product_version

STOP_MS = 3_000
DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""The boundaries that the conventions ask for."""
EVERY = {"gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "lora_sidecar"}
"""Attributes of every request. The core is not told whether a prompt came as a chat."""


def exporter_of(config: Otlp) -> MetricExporter:
    """Return what sends to the configured endpoint."""
    assert config.endpoint is not None
    if config.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcExporter

        return GrpcExporter(endpoint=config.endpoint)
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpExporter

    return HttpExporter(endpoint=f"{config.endpoint.rstrip('/')}/v1/metrics")


@dataclass
class _Open:
    """A request that has not ended: when it arrived, its sequences, and when its first token came."""

    arrived_ns: int
    sequences: int
    first_ns: int | None = None


class GenAiMetrics:
    """An observer of the core. `model_of` bounds the names of adapters; `instance` tells this process from others."""

    def __init__(self, state: State, exporter: MetricExporter, model_of: Callable[[str], str], instance: str) -> None:
        self._state = state
        self._model_of = model_of
        self._open: dict[int, _Open] = {}
        about = {"service.version": product_version(), "service.instance.id": instance}
        # The environment's own OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win.
        resource = Resource({"service.name": "lora-sidecar"} | about).merge(OTELResourceDetector().detect())
        self._provider = MeterProvider([PeriodicExportingMetricReader(exporter)], resource, shutdown_on_exit=False)
        meter = self._provider.get_meter("lora-sidecar", product_version())
        self._duration, self._per_token, self._first_token = (
            meter.create_histogram(f"gen_ai.server.{name}", "s", about, explicit_bucket_boundaries_advisory=bounds)
            for name, about, bounds in (
                ("request.duration", "Time from arrival to the end of a request.", DURATION_S),
                ("time_per_output_token", "Time per output token after the first one.", PER_TOKEN_S),
                ("time_to_first_token", "Time from arrival to the first token.", FIRST_TOKEN_S),
            )
        )

    def observed(self, event: ev.Event, effects: Sequence[do.Effect], now_ns: int) -> None:
        if isinstance(event, ev.Received):
            self._open[event.request] = _Open(now_ns, event.sequences)
        elif isinstance(event, ev.FirstToken):
            request, begun = self._state.requests.get(event.request), self._open.get(event.request)
            if begun is not None and request is not None and request.attempt == event.attempt:
                begun.first_ns = begun.first_ns or now_ns
        for effect in effects:
            if isinstance(effect, do.Settle):
                begun = self._open.pop(effect.request, None)
                if begun is not None and effect.reason is not Reason.NOT_OWNER:  # else it goes on at another replica
                    self._settled(effect, begun, now_ns)

    def _settled(self, effect: do.Settle, begun: _Open, now_ns: int) -> None:
        about = EVERY | {"gen_ai.request.model": self._model_of(effect.name)}
        failed = {} if effect.reason is None else {"error.type": effect.reason.name}
        self._duration.record((now_ns - begun.arrived_ns) / 1e9, about | failed)
        if effect.outcome is not Outcome.OK or begun.first_ns is None:
            return
        self._first_token.record((begun.first_ns - begun.arrived_ns) / 1e9, about)
        more = effect.output_tokens / begun.sequences - 1
        if more > 0:
            self._per_token.record((now_ns - begun.first_ns) / 1e9 / more, about)

    async def stop(self) -> None:
        """Send what is left, for a few seconds at most."""
        await asyncio.to_thread(self._provider.shutdown, STOP_MS)
