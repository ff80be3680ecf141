"""Start and stop the tracing of requests, if it is configured."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from sidecar.config.shared import Tracing
from sidecar.errors import Misused, Reason
from sidecar.shell.gateway import Gateway
from sidecar.shell.metrics import Metrics

if TYPE_CHECKING:
    from sidecar.tracing.sending import Sender


def trace_requests(config: Tracing, gateway: Gateway, metrics: Metrics, instance: str) -> Traces | None:
    """Trace a gateway's requests from now on; None if that is off. Raises Misused if the extra is not installed."""
    if config.endpoint is None:
        return None
    try:
        from sidecar.tracing.sending import sender_to
        from sidecar.tracing.tracer import Tracer
    except ImportError:
        raise Misused(
            Reason.CONFIG_INVALID, "tracing.endpoint needs an extra: pip install 'lora-sidecar[otel]'"
        ) from None
    sender = sender_to(config.endpoint, config.protocol, instance)
    tracer = Tracer(config.share, sender)
    gateway.begin_trace = tracer.begin
    gateway.chronicle.on_end.append(tracer.ended)
    metrics.traces = sender.figures
    return Traces(sender)


class Traces:
    """The traces that are being sent. `stop` sends what is left, for a few seconds at most."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        sender.start()

    async def stop(self) -> None:
        await asyncio.to_thread(self._sender.stop)
