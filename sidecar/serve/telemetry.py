"""Start and stop what is sent by OTLP, if it is configured."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sidecar.config.otlp import Otlp
from sidecar.errors import Misused, Reason, needs_extra
from sidecar.shell.gateway import Gateway
from sidecar.shell.metrics import Metrics

if TYPE_CHECKING:
    from sidecar.otlp.genai import GenAiMetrics
    from sidecar.otlp.sending import Sender


def send_telemetry(config: Otlp, gateway: Gateway, metrics: Metrics, instance: str) -> Telemetry | None:
    """Trace and measure a gateway's requests from now on; None if that is off.

    Raises Misused if the extra is not installed.
    """
    if config.endpoint is None:
        return None
    check_extra(config)
    from sidecar.otlp.exporting import metric_exporter, resource_of, span_exporter
    from sidecar.otlp.genai import GenAiMetrics
    from sidecar.otlp.sending import Sender
    from sidecar.otlp.tracer import Tracer

    resource, on_end = resource_of(instance), gateway.chronicle.on_end
    measured = sender = None
    if config.metrics:
        measured = GenAiMetrics(metric_exporter(config), resource, metrics.adapter_label)
        on_end.append(measured.ended)
    if config.traces:
        sender = Sender(span_exporter(config), resource)
        tracer = Tracer(config.share, sender)
        gateway.begin_trace = tracer.begin
        on_end.append(tracer.ended)
        metrics.traces = sender.figures
        sender.start()
    return Telemetry(measured, sender)


def check_extra(config: Otlp) -> None:
    """Raise Misused if what is configured needs packages that are not installed."""
    if config.endpoint is None:
        return
    try:
        import sidecar.otlp.genai
        import sidecar.otlp.tracer  # noqa: F401
    except ImportError:
        raise Misused(Reason.CONFIG_INVALID, needs_extra("otlp.endpoint", "otel")) from None


class Telemetry:
    """What is being sent."""

    def __init__(self, measured: GenAiMetrics | None, sender: Sender | None) -> None:
        self._parts = [part.stop for part in (measured, sender) if part is not None]

    async def stop(self) -> None:
        """Send what is left, for a few seconds at most."""
        await asyncio.gather(*(asyncio.to_thread(stop) for stop in self._parts))
