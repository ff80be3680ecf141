"""`gen_ai.server.*` and `gen_ai.client.inference.*` of OpenTelemetry's conventions for generative AI, sent by OTLP.

To its clients this process is the model's server, and it is a client of the engines.

It needs the extra `otel`; only what is configured imports this file. Requests are recorded at their end.
The library adds up and sends from a thread of its own, once a minute unless the environment says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExporter, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from sidecar.core.enums import Outcome
from sidecar.journal.segments import product_version
from sidecar.telling.record import Record

STOP_MS = 3_000
DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""The boundaries that the conventions ask for."""


class GenAiMetrics:
    """Measures ended requests. `model_of` bounds the names of adapters."""

    def __init__(self, exporter: MetricExporter, resource: Resource, model_of: Callable[[str], str]) -> None:
        self._model_of = model_of
        self._provider = MeterProvider([PeriodicExportingMetricReader(exporter)], resource, shutdown_on_exit=False)
        meter = self._provider.get_meter("lora-sidecar", product_version())
        self._duration, self._per_token, self._first_token, self._engine = (
            meter.create_histogram(f"gen_ai.{name}", "s", about, explicit_bucket_boundaries_advisory=bounds)
            for name, about, bounds in (
                ("server.request.duration", "Time from arrival to the end of a request.", DURATION_S),
                ("server.time_per_output_token", "Time per output token after the first one.", PER_TOKEN_S),
                ("server.time_to_first_token", "Time from arrival to the first token.", FIRST_TOKEN_S),
                ("client.inference.duration", "Time from the last dispatch to the end of a request.", DURATION_S),
            )
        )
        self._inputs, self._outputs = (
            meter.create_counter(f"gen_ai.client.inference.usage.{which}_tokens", "{token}", f"Tokens of {of}.")
            for which, of in (("input", "prompts"), ("output", "answers"))
        )

    def ended(self, record: Record) -> None:
        """Measure a request of this replica's core; called with every ending. Another replica measures its own."""
        settle, ended_ns = record.settle, record.ended_ns
        if settle is None or ended_ns is None or record.is_elsewhere:
            return
        about = {
            "gen_ai.operation.name": record.operation,
            "gen_ai.provider.name": "lora_sidecar",
            "gen_ai.request.model": self._model_of(settle.name),
        }
        failed = {} if settle.reason is None else {"error.type": settle.reason.name}
        arrived_ns = record.arrived_ns - record.waited_ns
        self._duration.record((ended_ns - arrived_ns) / 1e9, about | failed)
        if (sent_ns := record.sent_ns) is not None:
            self._engine.record((ended_ns - sent_ns) / 1e9, about | failed)
            self._inputs.add(settle.input_tokens, about)
            self._outputs.add(settle.output_tokens, about)
        first_ns = record.first_token_ns
        if settle.outcome is not Outcome.OK or first_ns is None:
            return
        self._first_token.record((first_ns - arrived_ns) / 1e9, about)
        more = settle.output_tokens / record.received.sequences - 1
        if more > 0:
            self._per_token.record((ended_ns - first_ns) / 1e9 / more, about)

    def stop(self) -> None:
        """Send what is left, for a few seconds at most."""
        self._provider.shutdown(STOP_MS)
