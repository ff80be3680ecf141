"""Exporters by OTLP, over gRPC or HTTP, and what they say of this process."""

from __future__ import annotations

from opentelemetry.sdk.metrics.export import MetricExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace.export import SpanExporter

from sidecar.config.otlp import Otlp
from sidecar.journal.segments import product_version


def resource_of(instance: str) -> Resource:
    """Return the attributes of this process, which `instance` tells from others.

    The environment's own OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win.
    """
    about = {"service.version": product_version(), "service.instance.id": instance}
    return Resource({"service.name": "lora-sidecar"} | about).merge(OTELResourceDetector().detect())


def span_exporter(config: Otlp) -> SpanExporter:
    assert config.endpoint is not None
    if config.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=config.endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter(endpoint=f"{config.endpoint.rstrip('/')}/v1/traces")


def metric_exporter(config: Otlp) -> MetricExporter:
    assert config.endpoint is not None
    if config.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcExporter

        return GrpcExporter(endpoint=config.endpoint)
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpExporter

    return HttpExporter(endpoint=f"{config.endpoint.rstrip('/')}/v1/metrics")
