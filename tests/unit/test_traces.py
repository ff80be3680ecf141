"""What becomes of a request's record: which traces are sent, whose child they are, and the spans that they have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sidecar.backends.api import Payload, Ticket
from sidecar.backends.buffers import AnswerBuffers
from sidecar.config.plugins import policies_of
from sidecar.core.core import Core
from sidecar.core.effects import Settle
from sidecar.core.enums import Fault
from sidecar.core.events import ClientLeft
from sidecar.otlp import sending
from sidecar.otlp import spans as spans_module
from sidecar.otlp.sending import Sender
from sidecar.otlp.spans import Spans, Trace
from sidecar.otlp.tracer import Tracer, parent_of
from sidecar.shell.chronicle import Chronicle, story
from sidecar.shell.requests import RequestFacts, TraceOrigin
from tests.kit.corekit import MS, SECOND, World

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
"""The example of W3C's text."""
PAYLOAD = Payload("m", b"", raw=True, unary=False)
RESOURCE = Resource({"service.name": "test"})


class Kept(Sender):
    """Keeps the records that it is given."""

    def __init__(self) -> None:
        super().__init__(Exported(), RESOURCE)
        self.taken: list[Any] = []

    def take(self, record: Any) -> None:
        self.taken.append(record)


class Exported(SpanExporter):
    """An exporter that keeps spans, or fails."""

    def __init__(self, result: SpanExportResult = SpanExportResult.SUCCESS) -> None:
        self.spans: list[ReadableSpan] = []
        self.result = result

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += spans
        return self.result


def ticket(number: int = 1) -> Ticket:
    return Ticket(number, PAYLOAD, "", AnswerBuffers())


def traced(world: World, origins: dict[int, TraceOrigin] | None = None, share: float = 1.0) -> tuple[Kept, Chronicle]:
    """Return what a sender gets of a world's requests, and their chronicle."""
    core, kept, now = Core(world.config, policies_of(world.config)), Kept(), [0]
    tracer = Tracer(share, kept)
    tickets: dict[int, Ticket] = {}

    def ticket_of(number: int) -> Ticket:
        made = tickets.setdefault(number, ticket(number))
        origin = (origins or {}).get(number, TraceOrigin(began_ns=now[0] - 1000))
        made.trace = made.trace or tracer.begin(made, RequestFacts("", trace=origin))
        return made

    chronicle = Chronicle(lambda: core.state, ticket_of, lambda: now[0])
    chronicle.on_end.append(tracer.ended)
    for now_ns, event in world.events:
        now[0] = now_ns
        effects = core.step(event, now_ns)
        chronicle.observed(event, effects, now_ns)
        for effect in effects:
            if isinstance(effect, Settle):
                chronicle.given_up(effect)
        for look in chronicle.looks():
            look()
    return kept, chronicle


def spans_of(record: Any) -> list[ReadableSpan]:
    return Spans(record, RESOURCE).made()


# W3C's context.


@pytest.mark.parametrize(
    ("traceparent", "is_valid"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", True),
        (f"00-{TRACE}-{SPAN}-ff", True),
        (f"01-{TRACE}-{SPAN}-01-what-the-future-brings", True),
        ("", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"00-{TRACE}-{SPAN}", False),
        (f"00-{TRACE[1:]}-{SPAN}-01", False),
        ("\x1b[2J" * 100, False),
    ],
)
def test_the_clients_context(traceparent: str, is_valid: bool) -> None:
    """Valid ones by https://www.w3.org/TR/trace-context/ are the parent; with others a new trace begins."""
    parent = parent_of(TraceOrigin(traceparent, "vendor=1"))
    assert (parent is not None) is is_valid
    trace = Tracer(1.0, Kept()).begin(ticket(), RequestFacts("", trace=TraceOrigin(traceparent, "vendor=1")))
    assert (f"{trace.context.trace_id:032x}" == TRACE) is is_valid
    if parent is not None:
        assert (f"{parent.span_id:016x}", parent.trace_state.get("vendor")) == (SPAN, "1")


def test_what_engines_and_replicas_get() -> None:
    """OpenTelemetry's own parser reads it: the same trace, the span of the leg, the state of others."""
    origin = TraceOrigin(f"00-{TRACE}-{SPAN}-01", "vendor=1,other=2")
    trace = Tracer(0.0, Kept()).begin(ticket(), RequestFacts("", trace=origin))
    sent = [dict(trace.headers(leg)) for leg in (1, 2, -1, 1)]
    assert sent[0] == sent[3]
    assert len({each["traceparent"] for each in sent}) == 3
    for leg, each in zip((1, 2, -1), sent, strict=False):
        assert each["tracestate"] == "vendor=1,other=2"
        read = parent_of(TraceOrigin(each["traceparent"], each["tracestate"]))
        assert read is not None
        assert (f"{read.trace_id:032x}", read.span_id) == (TRACE, trace.span(leg).span_id)
        assert TraceContextTextMapPropagator().extract(each)
    unsampled = TraceOrigin(f"00-{TRACE}-{SPAN}-00")
    assert Tracer(1.0, Kept()).begin(ticket(), RequestFacts("", trace=unsampled)).headers(1) == ()


def test_a_credential_in_the_state_goes_nowhere() -> None:
    """An API key that a client puts there by mistake is neither exported nor passed on."""
    key = "lsk_3fdca2eb99c0_" + "a" * 64
    trace = Tracer(0.0, Kept()).begin(
        ticket(), RequestFacts("", trace=TraceOrigin(f"00-{TRACE}-{SPAN}-01", f"vendor={key}"))
    )
    assert "a" * 16 not in f"{trace.headers(1)} {trace.context.trace_state}"


# Sampling.


def test_sampling() -> None:
    """A parent decides; of the others a share; those that failed or waited long are always sent."""
    world = World(seats=1)
    world.register("sql")
    for number in range(1, 201):
        world.send("sql" if number % 2 else "")
        world.run(for_ns=200 * MS)
    world.run()
    sampled, not_sampled = TraceOrigin(f"00-{TRACE}-{SPAN}-01"), TraceOrigin(f"00-{TRACE}-{SPAN}-00")
    all_of = dict.fromkeys(range(1, 201), sampled)
    assert len(traced(world, all_of, 0.0)[0].taken) == 200
    assert traced(world, dict.fromkeys(range(1, 201), not_sampled), 1.0)[0].taken == []
    assert traced(world, share=0.0)[0].taken == []
    assert 20 <= len(traced(world, share=0.25)[0].taken) <= 85  # 50 expected; the chance of less or more is below 1e-6


def test_errors_and_long_waits_are_always_sent() -> None:
    world = World(seats=1)
    for _ in range(40):
        world.send(deadline_ns=SECOND)
    refused = world.send("nobody")
    world.run()
    kept, _ = traced(world, share=0.0)
    sent = {record.request for record in kept.taken}
    waited = {number for number, settle in world.settled.items() if 2 * settle.queue_ns > (settle.bound_ns or SECOND)}
    failed = {number for number, settle in world.settled.items() if settle.reason is not None}
    assert refused in sent
    assert sent == waited | failed
    assert 0 < len(sent) < 41


# Spans.


def test_a_cold_and_healed_request() -> None:
    """The spans lie within the request's, waits add up to its queue time, and each attempt says how it ended."""
    world = World()
    world.register("sql")
    world.send("sql")
    world.run()
    world.engines["b0"].lie()
    request = world.send("sql", tenant="acme", client_id="mine", input_tokens=7)
    world.run()
    kept, chronicle = traced(world)
    cold, healed = (spans_of(record) for record in kept.taken)
    names = [span.name for span in cold]
    assert names[0] == "text_completion sql"
    assert {"lora.resolve", "lora.wait", "lora.fetch", "lora.load", "lora.attempt", "lora.answer"} == set(names[1:])
    root, settle = healed[0], world.settled[request]
    assert root.attributes is not None
    about = dict(root.attributes)
    assert (about["gen_ai.response.model"], about["gen_ai.usage.input_tokens"]) == ("sql@v1", 7)
    assert (about["gen_ai.usage.output_tokens"], about["lora.tenant"], about["lora.request.id"]) == (10, "acme", "mine")
    attempts = [span for span in healed if span.name == "lora.attempt"]
    assert [span.status.status_code for span in attempts] == [StatusCode.ERROR, StatusCode.UNSET]
    assert "engine_miss" in (attempts[0].status.description or "")
    waits = [span for span in healed if span.name == "lora.wait"]
    in_vain_ns = sum(_length_ns(span) for span in attempts[:1])
    assert sum(map(_length_ns, waits)) + in_vain_ns == settle.queue_ns
    told = story(chronicle, "mine", 0).reasons_ns()
    events = {event.name for span in waits for event in span.events if "lora.because" in (event.attributes or {})}
    assert events == {reason for reason in told if reason != "at an engine, in vain"}
    for span in (*cold, *healed):
        first = cold[0] if span in cold else root
        assert first.start_time is not None
        assert first.end_time is not None
        assert first.start_time <= span.start_time <= span.end_time <= first.end_time  # type: ignore[operator]
        if span is not first:
            assert span.parent is not None
            assert span.context.trace_id == first.context.trace_id
            parents = {each.context.span_id for each in (*cold, *healed)}
            assert span.parent.span_id in parents


def test_a_load_is_a_span_once_and_others_link_to_it() -> None:
    """Of requests that waited for one load the first has it; the others' waits link to that span."""
    world = World()
    world.register("sql")
    for _ in range(3):
        world.send("sql")
    world.run()
    kept, _ = traced(world)
    spans = {record.request: spans_of(record) for record in kept.taken}
    loads = [(request, span) for request, of in spans.items() for span in of if span.name == "lora.load"]
    assert [request for request, _ in loads] == [1]
    for request in (2, 3):
        (link,) = [link for span in spans[request] if span.name == "lora.wait" for link in span.links]
        assert link.context.span_id == loads[0][1].context.span_id
        assert link.context.trace_id == loads[0][1].context.trace_id


def test_an_error_is_one() -> None:
    """The request's status is ERROR with what its client was told; a cancelled one is none."""
    world = World()
    world.engines["b0"].run_faults = [Fault.REJECTED]
    world.send()
    world.run()
    left = world.send()
    world.feed(ClientLeft(left))
    world.run()
    kept, _ = traced(world)
    failed, cancelled = (spans_of(record)[0] for record in kept.taken)
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.attributes is not None
    assert failed.attributes["error.type"] == "BACKEND_REJECTED"
    assert cancelled.status.status_code is StatusCode.UNSET


def _length_ns(span: ReadableSpan) -> int:
    assert span.end_time is not None
    assert span.start_time is not None
    return span.end_time - span.start_time


# The thread.


def records(count: int) -> list[Any]:
    world = World()
    for _ in range(count):
        world.send()
        world.run()
    return traced(world)[0].taken


def test_what_comes_too_fast_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue is bounded; what is in it is sent at the stop."""
    monkeypatch.setattr(sending, "QUEUED_MAX", 4)
    exporter = Exported()
    sender = Sender(exporter, RESOURCE)
    for record in records(6):
        sender.take(record)
    sender.start()
    sender.stop()
    assert sender.figures() == {"sent": 4, "failed": 0, "dropped": 2}
    assert len({span.context.trace_id for span in exporter.spans}) == 4


def test_a_collector_that_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """Traces that it does not take are counted as failed."""
    sender = Sender(Exported(SpanExportResult.FAILURE), RESOURCE)
    for record in records(3):
        sender.take(record)
    sender.start()
    sender.stop()
    assert sender.figures() == {"sent": 0, "failed": 3, "dropped": 0}


def test_nothing_is_held_by_a_trace_but_ids() -> None:
    """A Trace has no room for a prompt."""
    assert Trace.__slots__ == ("_spans", "began_ns", "context", "operation", "parent")


def test_the_page_names_every_span_and_attribute() -> None:
    """What spans.py writes is in docs/tracing.md, and the other way round."""
    page, code = Path("docs/tracing.md").read_text(), Path(spans_module.__file__).read_text()
    written = set(re.findall(r'"((?:lora|gen_ai|error)\.[a-z_.]+)"', code))
    told = set(re.findall(r"`((?:lora|gen_ai|error)\.[a-z_.]+)`", page))
    assert written == told
