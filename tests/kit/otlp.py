"""A receiver of traces and metrics, made of OpenTelemetry's own services; of traces over HTTP, too, as Triton's are."""

from __future__ import annotations

import asyncio
import gzip
import json
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import uvicorn
from google.protobuf import json_format
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.kit.serving import until


@dataclass(frozen=True)
class Received:
    """A span as it was received, and who sent it."""

    service: str
    instance: str
    span: Any

    @property
    def name(self) -> str:
        return str(self.span.name)

    @property
    def trace(self) -> str:
        return bytes(self.span.trace_id).hex()

    @property
    def id(self) -> str:
        return bytes(self.span.span_id).hex()

    @property
    def parent(self) -> str:
        return bytes(self.span.parent_span_id).hex()

    @property
    def about(self) -> dict[str, Any]:
        return {each.key: _value(each.value) for each in self.span.attributes}

    @property
    def events(self) -> list[str]:
        return [str(event.name) for event in self.span.events]


def _from_json(body: bytes) -> Any:
    """Read OTLP's JSON, which writes ids in hex where protobuf's own JSON has base64."""

    def with_ids(members: dict[str, Any]) -> dict[str, Any]:
        ids = {key: members[key] for key in ("traceId", "spanId", "parentSpanId") if key in members}
        return members | {key: b64encode(bytes.fromhex(value)).decode() for key, value in ids.items()}

    record = json.loads(body, object_hook=with_ids)
    return json_format.ParseDict(record, pb.ExportTraceServiceRequest(), ignore_unknown_fields=True)


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))


@dataclass
class Collector:
    """What has been received: all spans, and the metrics that came last. `fails` makes it refuse traces."""

    spans: list[Received] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    service: str = ""
    """That of the metrics."""
    fails: bool = False
    grpc_url: str = ""
    http_url: str = ""

    def take_spans(self, request: Any) -> Any:
        for of_resource in request.resource_spans:
            about = {each.key: _value(each.value) for each in of_resource.resource.attributes}
            for of_scope in of_resource.scope_spans:
                self.spans += [
                    Received(about.get("service.name", ""), about.get("service.instance.id", ""), span)
                    for span in of_scope.spans
                ]
        return pb.ExportTraceServiceResponse()

    def take_metrics(self, request: Any) -> Any:
        (of_resource,) = request.resource_metrics
        self.service = {each.key: _value(each.value) for each in of_resource.resource.attributes}["service.name"]
        self.metrics = [metric for scope in of_resource.scope_metrics for metric in scope.metrics]
        return metrics_service_pb2.ExportMetricsServiceResponse()

    async def spans_over_http(self, request: Request) -> Response:
        body = await _body(request)
        if request.headers["content-type"].startswith("application/json"):
            answer = self.take_spans(_from_json(body))
            return Response(json_format.MessageToJson(answer), media_type="application/json")
        return _answered(self.take_spans(pb.ExportTraceServiceRequest.FromString(body)))

    def of(self, trace: str) -> list[Received]:
        return [span for span in self.spans if span.trace == trace]

    def named(self, name: str) -> list[Received]:
        return [span for span in self.spans if span.name == name]

    async def have(self, count: int, name: str) -> list[Received]:
        """Wait until so many spans with a name have come, and return them."""
        await until(lambda: len(self.named(name)) >= count)
        return self.named(name)


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    async def Export(self, request: Any, context: Any) -> Any:
        if self._collector.fails:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not today")
        return self._collector.take_spans(request)


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    async def Export(self, request: Any, context: Any) -> Any:
        return self._collector.take_metrics(request)


async def _body(request: Request) -> bytes:
    body = await request.body()
    return gzip.decompress(body) if request.headers.get("content-encoding") == "gzip" else body


def _answered(answer: Any) -> Response:
    return Response(answer.SerializeToString(), media_type="application/x-protobuf")


@asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    """Run a receiver for a block."""
    made = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Traces(made), server)  # type: ignore[no-untyped-call]
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Metrics(made), server)  # type: ignore[no-untyped-call]
    made.grpc_url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    app = Starlette(routes=[Route("/v1/traces", made.spans_over_http, methods=["POST"])])
    # Triton sends spans every 5 s over one connection. Uvicorn's own limit of 5 idle seconds would close it just then,
    # and what is on its way would be lost.
    http = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off", timeout_keep_alive=3600))
    serving = asyncio.create_task(http.serve())
    await until(lambda: http.started)
    made.http_url = f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        http.should_exit = True
        await serving
        await server.stop(None)


def tree(spans: list[Received]) -> dict[str, list[str]]:
    """Return the names of the children of each span, by its name; "" is who is not here."""
    names = {span.id: span.name for span in spans}
    found: dict[str, list[str]] = {}
    for span in sorted(spans, key=lambda span: span.span.start_time_unix_nano):
        found.setdefault(names.get(span.parent, ""), []).append(span.name)
    return found
