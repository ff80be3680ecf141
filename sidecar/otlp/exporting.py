"""Exporters by OTLP over gRPC, and what they say of this process.

There is none over HTTP: OpenTelemetry's reads an answer of any length, for as long as it comes, so that one broken
collector could take all memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from threading import get_ident
from time import monotonic
from typing import Any

from opentelemetry.exporter.otlp.proto.grpc import exporter
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult

from sidecar.config.otlp import Otlp
from sidecar.journal.segments import product_version

logger = logging.getLogger(__name__)

REPORTED_S = 60.0
"""How often a collector that takes nothing is worth a line."""


class _Kept(logging.Filter):
    """Keeps from the log what OpenTelemetry says of each batch; `of_thread` has the last of it by thread."""

    def __init__(self) -> None:
        super().__init__()
        self.of_thread: dict[int, str] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        self.of_thread[get_ident()] = record.getMessage()
        return False


_kept = _Kept()
exporter.logger.filters.insert(0, _kept)  # before its own, which drops what it has heard before


class _Reports:
    """Logs that a collector takes nothing, once in `REPORTED_S`, and that it does again."""

    def __init__(self, what: str, endpoint: str | None) -> None:
        self._what = f"{what} for {endpoint}"
        self._lost = 0
        self._told_s = float("-inf")
        self._is_told = False

    def sent(self, is_success: bool, lost: int = 0) -> None:
        """Take the result of a batch, and how many spans are lost if it failed."""
        if not is_success:
            self._lost += lost
            if monotonic() - self._told_s >= REPORTED_S:
                self._told_s, self._is_told = monotonic(), True
                why = _kept.of_thread.get(get_ident(), "OpenTelemetry does not say why")
                logger.error("%s are not received%s: %s", self._what, self._loss(), why)
        elif self._is_told:
            self._is_told = False
            logger.warning("%s are received again%s", self._what, self._loss())

    def _loss(self) -> str:
        """Return how many spans were dropped since that was told last."""
        lost, self._lost = self._lost, 0
        return f", {lost} spans were dropped" if lost else ""


class _SpanExporter(OTLPSpanExporter):
    def __init__(self, config: Otlp) -> None:
        super().__init__(endpoint=config.endpoint)
        self._reports = _Reports("traces", config.endpoint)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export(spans)
        self._reports.sent(result is SpanExportResult.SUCCESS, len(spans))
        return result


class _MetricExporter(OTLPMetricExporter):
    def __init__(self, config: Otlp) -> None:
        super().__init__(endpoint=config.endpoint)
        self._reports = _Reports("metrics", config.endpoint)

    def export(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **options: Any) -> MetricExportResult:
        result = super().export(metrics_data, timeout_millis, **options)
        self._reports.sent(result is MetricExportResult.SUCCESS)
        return result


def resource_of(instance: str) -> Resource:
    """Return the attributes of this process, which `instance` tells from others.

    The environment's own OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win.
    """
    about = {"service.version": product_version(), "service.instance.id": instance}
    return Resource({"service.name": "lora-sidecar"} | about).merge(OTELResourceDetector().detect())


def span_exporter(config: Otlp) -> OTLPSpanExporter:
    return _SpanExporter(config)


def metric_exporter(config: Otlp) -> OTLPMetricExporter:
    return _MetricExporter(config)
