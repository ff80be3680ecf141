"""Metrics that are sent by OTLP, besides those that are scraped."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from sidecar.config.section import Section


class Otlp(Section):
    """`gen_ai.server.*` of OpenTelemetry's conventions by OTLP; needs the extra otel. Off without `endpoint`.

    Headers, certificates, timeouts and the interval are taken from the environment, as OTEL_METRIC_EXPORT_INTERVAL.
    """

    endpoint: str | None = None
    protocol: Literal["grpc", "http"] = "grpc"

    @field_validator("endpoint")
    @classmethod
    def _has_a_scheme(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"{endpoint} has no scheme; write http://{endpoint} or, for TLS, https://{endpoint}")
        return endpoint


class Metrics(Section):
    otlp: Otlp = Otlp()
