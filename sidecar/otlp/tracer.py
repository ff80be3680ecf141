"""Begin a trace for each request, and decide at its end whether it is sent.

The trace context is W3C's (https://www.w3.org/TR/trace-context/). Sampling is parent-based; a request without a sampled
or unsampled parent is sampled at random. A request that failed, or waited for more than half of what it may wait, is
always sent, but engines and other replicas hear only of a trace that was sampled when it began.
"""

from __future__ import annotations

from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.trace import INVALID_SPAN_CONTEXT, SpanContext, TraceFlags, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sidecar.access.keys import without_secrets
from sidecar.backends.api import Ticket
from sidecar.core.enums import Outcome
from sidecar.otlp.sending import Sender
from sidecar.otlp.spans import Trace, new_span_id, new_trace_id
from sidecar.shell.requests import RequestFacts, TraceOrigin
from sidecar.telling.record import Record

_propagator = TraceContextTextMapPropagator()


class Tracer:
    """Begins traces, and gives `sender` the records of those that are to be sent. `share` is that of new traces."""

    def __init__(self, share: float, sender: Sender) -> None:
        self._sender = sender
        self._bound = TraceIdRatioBased.get_bound_for_rate(share)

    def begin(self, ticket: Ticket, facts: RequestFacts) -> Trace:
        parent = parent_of(facts.trace)
        if parent is None:
            trace_id = new_trace_id()
            is_sampled = trace_id & TraceIdRatioBased.TRACE_ID_LIMIT < self._bound
            flags, state = TraceFlags(TraceFlags.SAMPLED if is_sampled else TraceFlags.DEFAULT), None
        else:
            trace_id, flags, state = parent.trace_id, parent.trace_flags, parent.trace_state
        context = SpanContext(trace_id, new_span_id(), False, flags, state)
        return Trace(context, parent, facts.trace.began_ns, facts.operation)

    def ended(self, record: Record) -> None:
        """Give a request's record to the sender, if its trace is to be sent. Called with every ending."""
        if isinstance(record.trace, Trace) and (record.trace.is_sampled or is_worth_it(record)):
            self._sender.take(record)


def parent_of(origin: TraceOrigin) -> SpanContext | None:
    """Return the client's span, None if the request came without a valid trace context."""
    if not origin.traceparent:
        return None
    carrier = {"traceparent": origin.traceparent, "tracestate": without_secrets(origin.tracestate)}
    found = get_current_span(_propagator.extract(carrier)).get_span_context()
    return found if found is not INVALID_SPAN_CONTEXT and found.is_valid else None


def is_worth_it(record: Record) -> bool:
    """Return True if a request failed, or waited for more than half of its bound."""
    settle = record.settle
    if settle is None or settle.outcome not in (Outcome.OK, Outcome.CANCELLED):
        return True
    bound_ns = settle.bound_ns if settle.bound_ns is not None else record.expires_after_ns
    return bound_ns is not None and 2 * settle.queue_ns > bound_ns
