"""Turn the record of a request into spans of OpenTelemetry. docs/tracing.md has the names and attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from random import getrandbits
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind
from opentelemetry.trace.status import Status, StatusCode

from sidecar.core import effects as do
from sidecar.core import events as ev
from sidecar.core.enums import Outcome
from sidecar.model.reference import Reference
from sidecar.telling.endings import message_of, told
from sidecar.telling.record import PASSED_ON, GivenBack, News, PassedOn, Queued, QueuedAgain, Record, timeline_of
from sidecar.telling.timeline import AT_AN_ENGINE, Moment, Period

SCOPE = InstrumentationScope("sidecar")
OK, UNSET = Status(StatusCode.OK), Status(StatusCode.UNSET)
TOLD_AS_EVENTS = ("heal", "voided", "quarantine", "dropped")
"""News that are events of the wait or the attempt in which they came."""


class Trace:
    """The trace of one request (implements `backends.api.Traced`). Its spans' ids are made when they are asked for."""

    __slots__ = ("_spans", "began_ns", "context", "operation", "parent")

    def __init__(self, context: SpanContext, parent: SpanContext | None, began_ns: int, operation: str) -> None:
        self.context = context
        """Of the request's own span."""
        self.parent = parent
        """The client's span."""
        self.began_ns = began_ns
        self.operation = operation
        self._spans: dict[int | str, int] = {}

    @property
    def is_sampled(self) -> bool:
        return self.context.trace_flags.sampled

    def span(self, key: int | str) -> SpanContext:
        """Return the context of one of its spans: the same for the same leg, or for the same load."""
        own, number = self.context, self._spans.get(key)
        if number is None:
            number = self._spans[key] = new_span_id()
        return SpanContext(own.trace_id, number, False, own.trace_flags, own.trace_state)

    def headers(self, leg: int) -> tuple[tuple[str, str], ...]:
        if not self.is_sampled:
            return ()
        sent = self.span(leg)
        headers = (("traceparent", f"00-{sent.trace_id:032x}-{sent.span_id:016x}-01"),)
        return (*headers, ("tracestate", sent.trace_state.to_header())) if sent.trace_state else headers


def new_trace_id() -> int:
    return getrandbits(128) or 1


def new_span_id() -> int:
    return getrandbits(64) or 1


class Spans:
    """Makes the spans of one request."""

    def __init__(self, record: Record, resource: Resource) -> None:
        self._record = record
        self._resource = resource
        self._trace: Trace = record.trace
        self._until_ns = record.ended_ns if record.ended_ns is not None else record.arrived_ns
        self._since_utc_ns = record.utc_ns - record.arrived_ns

    def made(self) -> list[ReadableSpan]:
        """Return the request's own span first, then its children in order of their begin."""
        children = [*self._resolve(), *self._waits(), *self._ways_to_the_engine(), *self._legs()]
        return [self._own(), *sorted(children, key=lambda span: span.start_time or 0)]

    # The request.

    def _own(self) -> ReadableSpan:
        record, trace = self._record, self._trace
        name = record.received.adapter or BASE_NAME
        settle = record.settle
        is_error = settle is not None and settle.outcome not in (Outcome.OK, Outcome.CANCELLED)
        return ReadableSpan(
            f"{trace.operation} {name}",
            trace.context,
            trace.parent,
            self._resource,
            self._about_request(),
            kind=SpanKind.SERVER,
            status=Status(StatusCode.ERROR, message_of(settle)) if is_error and settle is not None else UNSET,
            start_time=self._utc_ns(trace.began_ns or record.arrived_ns),
            end_time=self._utc_ns(self._until_ns),
            instrumentation_scope=SCOPE,
        )

    def _about_request(self) -> dict[str, Any]:
        record, received = self._record, self._record.received
        settle, dispatch = record.settle, record.dispatch
        found: dict[str, Any] = {
            "gen_ai.operation.name": self._trace.operation,
            "gen_ai.provider.name": "lora_sidecar",
            "gen_ai.request.model": received.adapter or BASE_NAME,
            "gen_ai.usage.input_tokens": received.input_tokens,
            "gen_ai.request.max_tokens": received.output_tokens_max,
            "lora.request.id": received.client_id,
            "lora.request.number": record.request,
            "lora.tenant": received.tenant,
            "lora.class": received.klass,
            "lora.peer": record.peer,
        }
        if settle is not None:
            found |= {
                "gen_ai.usage.input_tokens": settle.input_tokens,
                "gen_ai.usage.output_tokens": settle.output_tokens,
                "lora.outcome": settle.outcome.value,
                "lora.queue_ms": settle.queue_ns / 1e6,
            }
            if settle.reason is not None:
                found["error.type"] = settle.reason.value
        if dispatch is not None:
            found |= {
                "gen_ai.response.model": _version(dispatch),
                "lora.backend": dispatch.backend,
                "lora.cache": dispatch.cache.value,
                "lora.heals": dispatch.heals,
            }
        if record.promised_ns is not None:
            found["lora.promised_ms"] = record.promised_ns / 1e6
        return {key: value for key, value in found.items() if value != ""}

    def _resolve(self) -> Iterator[ReadableSpan]:
        """Yield the time from the first look at the request until the core had it."""
        began_ns, arrived_ns = self._trace.began_ns, self._record.arrived_ns
        if began_ns and began_ns <= arrived_ns:
            yield self._child("lora.resolve", began_ns, arrived_ns, self._version())

    def _version(self) -> dict[str, Any]:
        ordinal, name = self._record.ordinal, Reference.of(self._record.received.adapter).name
        return {"lora.version": f"{name}@v{ordinal}"} if ordinal else {}

    # Waits.

    def _waits(self) -> Iterator[ReadableSpan]:
        """Yield each stay in a queue; its events are the reasons, each at the time from which on it held."""
        periods: list[Period] = []
        moments: list[Moment] = []
        for entry in timeline_of(self._record, self._until_ns).entries:
            if isinstance(entry, Period) and entry.main_reason not in (AT_AN_ENGINE, PASSED_ON):
                if periods and periods[-1].ended_ns != entry.begun_ns:
                    yield self._wait(periods, moments)
                    periods, moments = [], []
                periods.append(entry)
            elif isinstance(entry, Moment) and entry.what in TOLD_AS_EVENTS:
                moments.append(entry)
        if periods:
            yield self._wait(periods, moments)

    def _wait(self, periods: Sequence[Period], moments: Sequence[Moment]) -> ReadableSpan:
        begun_ns, ended_ns = periods[0].begun_ns, periods[-1].ended_ns
        events = [
            self._event(
                period.main_reason, period.begun_ns, {"lora.because": period.because, "lora.backend": period.backend}
            )
            for period in periods
        ]
        events += [
            self._event(moment.what, moment.at_ns, {"lora.what": moment.text})
            for moment in moments
            if begun_ns <= moment.at_ns <= ended_ns
        ]
        own = self._trace.context.trace_id
        joined = [
            Link(load, {"lora.load": news.load})
            for news in self._record.news
            if news.what in ("loaded", "load_failed") and begun_ns <= news.at_ns <= ended_ns
            if (load := self._load_of_another(news)) is not None and load.trace_id != own
        ]
        about = {"lora.why": _longest(periods), "lora.backend": periods[-1].backend}
        return self._child("lora.wait", begun_ns, ended_ns, about, events, links=joined)

    def _load_of_another(self, news: News) -> SpanContext | None:
        owner: Trace | None = news.trace
        return None if owner is None or owner is self._trace else owner.span(_load_key(news.load))

    # Fetch, pack, load.

    def _ways_to_the_engine(self) -> Iterator[ReadableSpan]:
        """Yield the fetches and packings of its version, and the loads that were begun for this request."""
        fetch: News | None = None
        loads: dict[int, News] = {}
        for news in self._record.news:
            if news.what == "fetch":
                fetch = news
            elif news.what in ("fetched", "fetch_failed") and fetch is not None:
                yield from self._fetch(fetch, news)
                fetch = None
            elif news.what == "load":
                loads[news.load] = news
            elif news.what in ("loaded", "load_failed") and (begun := loads.pop(news.load, None)) is not None:
                yield from self._load(begun, news)

    def _fetch(self, begun: News, ended: News) -> Iterator[ReadableSpan]:
        packed_from_ns = ended.at_ns - min(ended.pack_ns, ended.at_ns - begun.at_ns)
        status = Status(StatusCode.ERROR, ended.text) if ended.what == "fetch_failed" else UNSET
        yield self._child("lora.fetch", begun.at_ns, packed_from_ns, {"lora.what": begun.text}, status=status)
        if ended.pack_ns:
            yield self._child("lora.pack", packed_from_ns, ended.at_ns, {})

    def _load(self, begun: News, ended: News) -> Iterator[ReadableSpan]:
        if ended.trace not in (None, self._trace):
            return  # it is a span of the request for which it was begun
        status = Status(StatusCode.ERROR, ended.text) if ended.what == "load_failed" else UNSET
        about = {"lora.load": begun.load, "lora.backend": begun.backend}
        context = self._trace.span(_load_key(begun.load))
        yield self._child("lora.load", begun.at_ns, ended.at_ns, about, status=status, context=context)

    # Engines and other replicas.

    def _legs(self) -> Iterator[ReadableSpan]:
        """Yield what was sent to engines, with the answer below it, and to other replicas."""
        leg: _Leg | None = None
        for _, at_ns, what in self._record.entries():
            if isinstance(what, do.Dispatch | PassedOn):
                leg = _Leg(at_ns, what)
            elif leg is None:
                continue
            elif isinstance(what, ev.FirstToken):
                leg.first_token_ns = at_ns
            elif isinstance(what, ev.RunFailed):
                leg.failed_ns, leg.failure = at_ns, f"{what.fault.value}: {what.text}"
            elif isinstance(what, GivenBack | QueuedAgain | do.Settle | Queued):
                yield from self._leg(leg, at_ns, what)
                leg = None

    def _leg(self, leg: _Leg, at_ns: int, end: Any) -> Iterator[ReadableSpan]:
        ended_ns, sent = leg.failed_ns or at_ns, leg.sent
        failure = leg.failure
        if isinstance(end, GivenBack):
            failure = told(end.why)
        elif isinstance(end, QueuedAgain) and not failure:
            failure = "the engine was lost"
        elif isinstance(end, do.Settle) and end.outcome not in (Outcome.OK, Outcome.CANCELLED):
            failure = failure or message_of(end)
        status = Status(StatusCode.ERROR, failure) if failure else UNSET
        if isinstance(sent, PassedOn):
            about: dict[str, Any] = {"lora.replica": sent.replica, "lora.backend": sent.backend}
            context = self._trace.span(sent.leg)
            yield self._child(
                "lora.forward", leg.since_ns, ended_ns, about, kind=SpanKind.CLIENT, status=status, context=context
            )
            return
        about = {
            "lora.backend": sent.backend,
            "lora.attempt": sent.attempt,
            "lora.cache": sent.cache.value,
            "gen_ai.response.model": _version(sent),
        }
        events = []
        if leg.first_token_ns:
            events.append(self._event("first_token", leg.first_token_ns, {}))
            about["gen_ai.response.time_to_first_chunk"] = (leg.first_token_ns - leg.since_ns) / 1e9
        context = self._trace.span(sent.attempt)
        yield self._child(
            "lora.attempt", leg.since_ns, ended_ns, about, events, kind=SpanKind.CLIENT, status=status, context=context
        )
        if leg.first_token_ns:
            yield self._child("lora.answer", leg.first_token_ns, ended_ns, {}, parent=context)

    # Parts of a span.

    def _child(
        self,
        name: str,
        begun_ns: int,
        ended_ns: int,
        about: dict[str, Any],
        events: Sequence[Event] = (),
        links: Iterable[Link] = (),
        kind: SpanKind = SpanKind.INTERNAL,
        status: Status = UNSET,
        context: SpanContext | None = None,
        parent: SpanContext | None = None,
    ) -> ReadableSpan:
        return ReadableSpan(
            name,
            context or self._trace.span(f"{name} {begun_ns}"),
            parent or self._trace.context,
            self._resource,
            {key: value for key, value in about.items() if value != ""},
            events,
            tuple(links),
            kind,
            status=status,
            start_time=self._utc_ns(begun_ns),
            end_time=self._utc_ns(ended_ns),
            instrumentation_scope=SCOPE,
        )

    def _event(self, name: str, at_ns: int, about: dict[str, Any]) -> Event:
        return Event(name, {key: value for key, value in about.items() if value}, self._utc_ns(at_ns))

    def _utc_ns(self, at_ns: int) -> int:
        return at_ns + self._since_utc_ns


class _Leg:
    """What was sent to an engine or a replica, until it came back or ended."""

    def __init__(self, since_ns: int, sent: do.Dispatch | PassedOn) -> None:
        self.since_ns = since_ns
        self.sent = sent
        self.first_token_ns = 0
        self.failed_ns = 0
        self.failure = ""


BASE_NAME = "base"


def _load_key(load: int) -> str:
    return f"load {load}"


def _version(dispatch: do.Dispatch) -> str:
    return f"{dispatch.name}@v{dispatch.ordinal}" if dispatch.name else BASE_NAME


def _longest(periods: Sequence[Period]) -> str:
    held_ns: dict[str, int] = {}
    for period in periods:
        held_ns[period.main_reason] = held_ns.get(period.main_reason, 0) + period.duration_ns
    return max(held_ns, key=lambda reason: held_ns[reason])
