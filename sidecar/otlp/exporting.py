"""Exporters by OTLP over gRPC, and what they say of this process.

There is none over HTTP: OpenTelemetry's reads an answer of any length, for as long as it comes, so that one broken
collector could take all memory.
"""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource

from sidecar.config.otlp import Otlp
from sidecar.journal.segments import product_version


def resource_of(instance: str) -> Resource:
    """Return the attributes of this process, which `instance` tells from others.

    The environment's own OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win.
    """
    about = {"service.version": product_version(), "service.instance.id": instance}
    return Resource({"service.name": "lora-sidecar"} | about).merge(OTELResourceDetector().detect())


def span_exporter(config: Otlp) -> OTLPSpanExporter:
    return OTLPSpanExporter(endpoint=config.endpoint)


def metric_exporter(config: Otlp) -> OTLPMetricExporter:
    return OTLPMetricExporter(endpoint=config.endpoint)
