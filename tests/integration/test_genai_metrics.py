"""`gen_ai.server.*` by OTLP, as a receiver that is made of OpenTelemetry's own services gets them.

Names, units and boundaries are those of its semantic conventions: https://opentelemetry.io/docs/specs/semconv/gen-ai
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import uvicorn
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc
from opentelemetry.semconv._incubating.metrics import gen_ai_metrics as conventions
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sidecar.config import parse
from sidecar.config.metrics import Otlp
from sidecar.core import events as ev
from sidecar.errors import Misused
from sidecar.serve.app import Sidecar
from sidecar.shell.genai_metrics import GenAiMetrics, exporter_of
from tests.kit.corekit import MS, SECOND
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import DUMMY
from tests.kit.serving import serving, until, write_adapters
from tests.unit.test_metrics import Measured

DURATION = conventions.GEN_AI_SERVER_REQUEST_DURATION
PER_TOKEN = conventions.GEN_AI_SERVER_TIME_PER_OUTPUT_TOKEN
FIRST_TOKEN = conventions.GEN_AI_SERVER_TIME_TO_FIRST_TOKEN
BOUNDARIES = {
    DURATION: [0.01 * 2**power for power in range(14)],
    PER_TOKEN: [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5],
    FIRST_TOKEN: [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0],
}
Points = dict[tuple[str, str, str], tuple[int, float]]
"""Count and sum by metric, model and error."""


@dataclass
class Collector(metrics_service_pb2_grpc.MetricsServiceServicer):
    """What has been received last."""

    metrics: list[Any] = field(default_factory=list)
    service: str = ""
    urls: dict[str, str] = field(default_factory=dict)

    def take(self, request: Any) -> Any:
        [of_resource] = request.resource_metrics
        self.service = {each.key: each.value.string_value for each in of_resource.resource.attributes}["service.name"]
        self.metrics = [metric for scope in of_resource.scope_metrics for metric in scope.metrics]
        return pb.ExportMetricsServiceResponse()

    async def Export(self, request: Any, context: Any) -> Any:
        return self.take(request)

    async def over_http(self, request: Request) -> Response:
        body = await request.body()
        body = gzip.decompress(body) if request.headers.get("content-encoding") == "gzip" else body
        answer = self.take(pb.ExportMetricsServiceRequest.FromString(body))
        return Response(answer.SerializeToString(), media_type="application/x-protobuf")

    @property
    def points(self) -> Points:
        found: Points = {}
        for metric in self.metrics:
            for point in metric.histogram.data_points:
                about = {each.key: each.value.string_value for each in point.attributes}
                assert {"gen_ai.operation.name", "gen_ai.provider.name"} <= about.keys()
                key = (metric.name, about["gen_ai.request.model"], about.get("error.type", ""))
                found[key] = (point.count, point.sum)
        return found


@asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    """Run a receiver for a block."""
    made = Collector()
    server = grpc.aio.server()
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(made, server)  # type: ignore[no-untyped-call]
    made.urls["grpc"] = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    app = Starlette(routes=[Route("/v1/metrics", made.over_http, methods=["POST"])])
    http = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    listening = asyncio.create_task(http.serve())
    await until(lambda: http.started)
    made.urls["http"] = f"http://127.0.0.1:{http.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        http.should_exit = True
        await listening
        await server.stop(None)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_a_served_request_arrives(protocol: str, tmp_path: Path) -> None:
    """At the latest when the process ends."""
    write_adapters(tmp_path, 1)
    async with collector() as received, running_engine(**DUMMY) as engine:
        otlp = {"endpoint": received.urls[protocol], "protocol": protocol}
        async with serving([engine], tmp_path, metrics={"otlp": otlp}) as served:
            await served.ask("a00", tokens=4)
        points = received.points
    assert {key: count for key, (count, _) in points.items()} == {
        (name, "a00", ""): 1 for name in (DURATION, PER_TOKEN, FIRST_TOKEN)
    }
    assert points[DURATION, "a00", ""][1] > points[FIRST_TOKEN, "a00", ""][1] > 0
    assert received.service == "lora-sidecar"
    for metric in received.metrics:
        [point] = metric.histogram.data_points
        assert metric.unit == "s"
        assert list(point.explicit_bounds) == pytest.approx(BOUNDARIES[metric.name])


class Observed(Measured):
    """A world whose steps are measured for OTLP as well."""

    def __init__(self, endpoint: str) -> None:
        self.genai: GenAiMetrics | None = None
        super().__init__()
        assert self.metrics is not None
        exporter = exporter_of(Otlp(endpoint=endpoint))
        self.genai = GenAiMetrics(self.core.state, exporter, self.metrics.adapter_label, "test")

    def feed(self, event: ev.Event) -> list:  # type: ignore[type-arg]
        made = super().feed(event)
        if self.genai is not None:
            self.genai.observed(event, made, self.now_ns)
        return made


async def test_times_and_errors() -> None:
    """First tokens and times per token are those of answers, durations those of all."""
    async with collector() as received:
        world = Observed(received.urls["grpc"])
        world.register("sql")
        engine = world.engines["b0"]
        engine.load_ns, engine.first_token_ns, engine.run_ns = SECOND, 2 * SECOND, 5 * SECOND
        world.fetch_ns = SECOND
        world.send("sql")
        world.run()
        world.send(sequences=2)
        world.run()
        world.send("nobody")
        engine.silent = True
        one_piece = world.send()
        world.run(for_ns=7 * SECOND)
        world.feed(ev.RunEnded(one_piece, 1, 10))
        leaves = world.send()
        world.run(for_ns=500 * MS)
        world.feed(ev.ClientLeft(leaves))
        assert world.genai is not None
        await world.genai.stop()
        assert not world.genai._open
        points = {key: (count, round(total, 3)) for key, (count, total) in received.points.items()}
    assert points[FIRST_TOKEN, "sql", ""] == (1, 4)
    assert points[PER_TOKEN, "sql", ""] == (1, round(3 / 9, 3))
    assert points[DURATION, "sql", ""] == (1, 7)
    assert points[PER_TOKEN, "_base", ""] == (1, 0.75)
    assert points[DURATION, "_base", ""] == (2, 5 + 7)
    assert points[DURATION, "_base", "CANCELLED"] == (1, 0.5)
    assert points[DURATION, "_other", "UNKNOWN_ADAPTER"] == (1, 0)
    assert len(points) == 8


async def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without the configuration nothing is installed or needed."""
    monkeypatch.setitem(__import__("sys").modules, "sidecar.shell.genai_metrics", None)
    with pytest.raises(Misused, match=r"lora-sidecar\[otel\]"):
        Sidecar(parse({"metrics": {"otlp": {"endpoint": "http://127.0.0.1:4317"}}}, "the test"))
    assert Sidecar(parse({}, "the test")).genai is None


def test_an_endpoint_without_a_scheme_is_refused() -> None:
    with pytest.raises(Misused, match="write http://collector:4317"):
        parse({"metrics": {"otlp": {"endpoint": "collector:4317"}}}, "the test")
