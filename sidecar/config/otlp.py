"""What is sent by OTLP: traces of requests, and the metrics of OpenTelemetry's conventions for generative AI."""

from __future__ import annotations

from pydantic import Field, field_validator

from sidecar.config.section import Section


class Otlp(Section):
    """A receiver of OpenTelemetry by gRPC; needs the extra otel. Nothing is sent without `endpoint`.

    Headers, certificates and timeouts are taken from the environment, as OTEL_EXPORTER_OTLP_HEADERS.
    """

    endpoint: str | None = None
    traces: bool = True
    metrics: bool = True
    share: float = Field(0.05, ge=0, le=1)
    """Of the requests that come without a trace. One that comes with a trace is sampled as that is."""

    @field_validator("endpoint")
    @classmethod
    def _has_a_scheme(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError(f"{endpoint} has no scheme; write http://{endpoint} or, for TLS, https://{endpoint}")
        return endpoint
