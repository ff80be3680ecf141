"""CPU time of tracing every request: on the event loop, and in all with the thread that makes and sends the spans."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from time import process_time_ns, thread_time_ns

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from sidecar.backends.api import Payload, Ticket
from sidecar.backends.buffers import AnswerBuffers
from sidecar.config.plugins import policies_of
from sidecar.core.core import Core
from sidecar.otlp.sending import Sender
from sidecar.otlp.spans import Spans
from sidecar.otlp.tracer import Tracer
from sidecar.shell.chronicle import Chronicle
from sidecar.shell.requests import RequestFacts, TraceOrigin
from sidecar.telling.record import Record
from tests.bench.figures import Figure, middle
from tests.kit.corekit import MS, World
from tests.kit.otlp import collector

REQUESTS, ROUNDS = 2_000, 5
ON_LOOP_US, IN_ALL_US = 100.0, 500.0
PAYLOAD = Payload("m", b"", raw=True, unary=False)
RESOURCE = Resource({"service.name": "bench"})
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def bench(folder: Path) -> list[Figure]:
    """Replay a busy pool's steps to the observer, with and without tracing, and send all of the traces."""
    world = _world()
    off, on, sends, spans = [], [], [], 0
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_collect, args=(there,), daemon=True)
    process.start()
    try:
        url = await asyncio.to_thread(here.recv)
        for _ in range(ROUNDS):
            off.append(_observed(world, None)[0])
            cost_us, records = _observed(world, Tracer(1.0, _Keeper()))
            on.append(cost_us)
            sent_us, spans = await asyncio.to_thread(_sent, records, OTLPSpanExporter(endpoint=url))
            sends.append(sent_us)
    finally:
        process.kill()
    loop_us = middle(on) - middle(off)
    beside = "the observer that keeps the stories of requests, without tracing"
    in_all = f"traces: in all, a request of {spans / REQUESTS:.1f} spans"
    return [
        Figure("traces: on the event loop, a request", loop_us, "µs", middle(off), beside, "value", ON_LOOP_US),
        Figure(in_all, loop_us + middle(sends), "µs", middle(off), beside, "value", IN_ALL_US),
    ]


def _world() -> World:
    """Return a pool that has answered the requests: some wait, some are cold, some join a load."""
    world = World(engines=2, host_pages=8, device_pages=4, seats=4)
    world.register(*(f"a{number}" for number in range(16)))
    for number in range(REQUESTS):
        world.send(f"a{number * 7 % 16}", tenant=f"t{number % 3}", client_id=f"id-{number}")
        world.run(for_ns=4 * MS)
    world.run()
    return world


class _Keeper(Sender):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def take(self, record: Record) -> None:
        self.records.append(record)


def _observed(world: World, tracer: Tracer | None) -> tuple[float, list[Record]]:
    """Return the CPU time that the observer takes for a request, in µs, and the records that are to be sent."""
    tickets: dict[int, Ticket] = {}
    core = Core(world.config, policies_of(world.config))

    def ticket_of(number: int) -> Ticket:
        ticket = tickets[number] = Ticket(number, PAYLOAD, "", AnswerBuffers())
        if tracer is not None:
            ticket.trace = tracer.begin(ticket, RequestFacts("", trace=TraceOrigin(TRACEPARENT, "", 1)))
            ticket.trace.headers(1)
        return ticket

    chronicle = Chronicle(lambda: core.state, ticket_of)
    if tracer is not None:
        chronicle.on_end.append(tracer.ended)
    gc.collect()
    spent_ns = 0
    for now_ns, event in world.events:
        effects = core.step(event, now_ns)
        began_ns = thread_time_ns()
        chronicle.observed(event, effects, now_ns)
        spent_ns += thread_time_ns() - began_ns
    keeper = None if tracer is None else tracer._sender
    return spent_ns / REQUESTS / 1e3, keeper.records if isinstance(keeper, _Keeper) else []


def _sent(records: list[Record], exporter: OTLPSpanExporter) -> tuple[float, int]:
    """Return the CPU time that making and sending the spans of a request takes, in µs, and the number of spans."""
    gc.collect()
    began, count = process_time_ns(), 0
    spans: list[ReadableSpan] = []
    for record in records:
        spans += Spans(record, RESOURCE).made()
        if len(spans) >= 128:
            exporter.export(spans)
            count += len(spans)
            spans = []
    exporter.export(spans)
    spent_ns = process_time_ns() - began
    exporter.shutdown()
    return spent_ns / len(records) / 1e3, count + len(spans)


def _collect(pipe: Connection) -> None:
    async def run() -> None:
        async with collector() as made:
            pipe.send(made.grpc_url)
            await asyncio.Event().wait()

    asyncio.run(run())
