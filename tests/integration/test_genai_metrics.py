"""`gen_ai.*` by OTLP, as a receiver that is made of OpenTelemetry's own services gets them.

Names, units and boundaries are those of https://github.com/open-telemetry/semantic-conventions-genai
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")

from opentelemetry.semconv._incubating.metrics import gen_ai_metrics as conventions

from sidecar.cli import run
from sidecar.config import parse
from sidecar.config.otlp import Otlp
from sidecar.core import events as ev
from sidecar.errors import Misused, needs_extra
from sidecar.otlp.exporting import metric_exporter, resource_of
from sidecar.otlp.genai import GenAiMetrics
from sidecar.serve.app import Sidecar
from sidecar.shell.chronicle import Chronicle
from tests.kit.corekit import MS, SECOND
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import DUMMY
from tests.kit.otlp import Collector, collector
from tests.kit.peft_files import BASE_MODEL
from tests.kit.redis_servers import running
from tests.kit.replica_pool import CALM_S, owned, replicas
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.vllm_emulated import VllmProcess
from tests.unit.test_metrics import Measured

DURATION = conventions.GEN_AI_SERVER_REQUEST_DURATION
PER_TOKEN = conventions.GEN_AI_SERVER_TIME_PER_OUTPUT_TOKEN
FIRST_TOKEN = conventions.GEN_AI_SERVER_TIME_TO_FIRST_TOKEN
BOUNDARIES = {
    DURATION: [0.01 * 2**power for power in range(14)],
    PER_TOKEN: [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5],
    FIRST_TOKEN: [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0],
}
CLIENT = "gen_ai.client.inference"
ENGINES_TIME, INPUTS, OUTPUTS = f"{CLIENT}.duration", f"{CLIENT}.usage.input_tokens", f"{CLIENT}.usage.output_tokens"
"""What the conventions ask of clients of a model server, in the repository that they have now:
https://github.com/open-telemetry/semantic-conventions-genai/blob/v0.1.0/docs/gen-ai/client-inference.md"""
BOUNDARIES[ENGINES_TIME] = BOUNDARIES[DURATION]
Points = dict[tuple[str, str, str], tuple[int, float]]
"""Count and sum by metric, model and error."""


def points_of(received: Collector) -> Points:
    found: Points = {}
    for metric in received.metrics:
        if metric.WhichOneof("data") == "sum":
            continue
        for point in metric.histogram.data_points:
            about = {each.key: each.value.string_value for each in point.attributes}
            assert {"gen_ai.operation.name", "gen_ai.provider.name"} <= about.keys()
            key = (metric.name, about["gen_ai.request.model"], about.get("error.type", ""))
            found[key] = (point.count, point.sum)
    return found


async def test_a_served_request_arrives(tmp_path: Path) -> None:
    """At the latest when the process ends."""
    write_adapters(tmp_path, 1)
    async with collector() as received, running_engine(**DUMMY) as engine:
        otlp = {"endpoint": received.grpc_url, "traces": False}
        async with serving([engine], tmp_path, otlp=otlp) as served:
            await served.ask("a00", tokens=4)
        points = points_of(received)
    assert {key: count for key, (count, _) in points.items()} == {
        (name, "a00", ""): 1 for name in (DURATION, PER_TOKEN, FIRST_TOKEN, ENGINES_TIME)
    }
    assert sums_of(received) == {(INPUTS, "a00"): 5, (OUTPUTS, "a00"): 4}
    assert points[DURATION, "a00", ""][1] >= points[ENGINES_TIME, "a00", ""][1] > 0
    assert points[DURATION, "a00", ""][1] > points[FIRST_TOKEN, "a00", ""][1] > 0
    assert received.service == "lora-sidecar"
    for metric in received.metrics:
        if metric.name in (INPUTS, OUTPUTS):
            continue
        [point] = metric.histogram.data_points
        assert metric.unit == "s"
        assert list(point.explicit_bounds) == pytest.approx(BOUNDARIES[metric.name])


def sums_of(received: Collector) -> dict[tuple[str, str], int]:
    """Return the sums by metric and model."""
    found = {}
    for metric in received.metrics:
        for point in metric.sum.data_points:
            about = {each.key: each.value.string_value for each in point.attributes}
            assert {"gen_ai.operation.name", "gen_ai.provider.name"} <= about.keys()
            assert (metric.unit, metric.sum.is_monotonic) == ("{token}", True)
            found[metric.name, about["gen_ai.request.model"]] = point.as_int
    return found


def operations_of(received: Collector) -> set[str]:
    points = [point for metric in received.metrics for point in metric.histogram.data_points or metric.sum.data_points]
    about = [{each.key: each.value.string_value for each in point.attributes} for point in points]
    return {each["gen_ai.operation.name"] for each in about}


async def ask(served: Serving, path: str) -> None:
    body = {"model": "a00", "max_tokens": 4}
    prompt = {"prompt": "hi"} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        answer = await client.post(f"http://{served.sidecar.http_address}/v1/{path}", json=body | prompt)
    assert answer.status_code == 200, answer.text


@asynccontextmanager
async def chatting(folder: Path, kind: str) -> AsyncIterator[tuple[Any, dict[str, Any]]]:
    """Run an engine that answers chats: a vLLM, which writes them itself, or a Triton, for which they are text."""
    if kind == "vllm":
        (folder / "shared").mkdir()
        async with VllmProcess("--compute", "none") as engine:
            yield engine, {"adapters_dir": str(folder / "shared")}
    else:
        (folder / "chat.jinja").write_text("{{ messages[0].content }}")
        async with running_engine(**DUMMY) as engine:
            yield engine, {"base_model": {"name": BASE_MODEL, "chat_template": str(folder / "chat.jinja")}}


@pytest.mark.parametrize("kind", ["vllm", "triton"])
@pytest.mark.parametrize(("path", "operation"), [("chat/completions", "chat"), ("completions", "text_completion")])
async def test_a_chat_is_one_whatever_its_engine_gets(tmp_path: Path, kind: str, path: str, operation: str) -> None:
    write_adapters(tmp_path / "adapters", 1)
    async with collector() as received, chatting(tmp_path, kind) as (engine, backend):
        otlp = {"endpoint": received.grpc_url, "share": 1.0}
        async with serving([engine], tmp_path / "adapters", backend=backend, otlp=otlp) as served:
            await ask(served, path)
        [span] = received.named(f"{operation} a00")
        assert span.about["gen_ai.operation.name"] == operation
        assert operations_of(received) == {operation}
        assert sums_of(received) == {
            (INPUTS, "a00"): span.about["gen_ai.usage.input_tokens"],
            (OUTPUTS, "a00"): 4,
        }


async def test_a_chat_is_one_at_the_replica_that_has_its_engine(tmp_path: Path) -> None:
    write_adapters(tmp_path / "adapters", 1)
    async with (
        running(tmp_path / "redis") as redis,
        collector() as received,
        chatting(tmp_path, "triton") as (engine, backend),
        replicas(
            2, redis.url, [engine], tmp_path / "adapters", lease_s=CALM_S, backend=backend,
            otlp={"endpoint": received.grpc_url, "share": 1.0},
        ) as pool,
    ):  # fmt: skip
        await until(lambda: all("a00" in served.state.names for served in pool))
        [other] = [served for served in pool if not owned(served)]
        await ask(other, "chat/completions")
        spans = await received.have(2, "chat a00")
        assert len({span.instance for span in spans}) == 2


class Observed(Measured):
    """A world whose endings are measured for OTLP as well."""

    def __init__(self, endpoint: str) -> None:
        self.chronicle: Chronicle | None = None
        super().__init__()
        assert self.metrics is not None
        exporter = metric_exporter(Otlp(endpoint=endpoint))
        self.genai = GenAiMetrics(exporter, resource_of("test"), self.metrics.adapter_label)
        self.chronicle = Chronicle(lambda: self.core.state, lambda _: None, waited_ns={1: 10 * SECOND})
        self.chronicle.on_end.append(self.genai.ended)

    def feed(self, event: ev.Event) -> list:  # type: ignore[type-arg]
        made = super().feed(event)
        if self.chronicle is not None:
            self.chronicle.observed(event, made, self.now_ns)
        return made


async def test_times_and_errors() -> None:
    """First tokens and times per token are those of answers, durations those of all.

    They begin with the arrival at the first replica: the first request was at another one for ten seconds.
    """
    async with collector() as received:
        world = Observed(received.grpc_url)
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
        await asyncio.to_thread(world.genai.stop)
        points = {key: (count, round(total, 3)) for key, (count, total) in points_of(received).items()}
    assert points[FIRST_TOKEN, "sql", ""] == (1, 10 + 4)
    assert points[PER_TOKEN, "sql", ""] == (1, round(3 / 9, 3))
    assert points[DURATION, "sql", ""] == (1, 10 + 7)
    assert points[PER_TOKEN, "_base", ""] == (1, 0.75)
    assert points[DURATION, "_base", ""] == (2, 5 + 7)
    assert points[DURATION, "_base", "CANCELLED"] == (1, 0.5)
    assert points[DURATION, "_other", "UNKNOWN_ADAPTER"] == (1, 0)
    # The engine's part of it, from the dispatch on; what no engine had has none.
    assert points[ENGINES_TIME, "sql", ""] == (1, 5)
    assert points[ENGINES_TIME, "_base", ""] == (2, 5 + 7)
    assert points[ENGINES_TIME, "_base", "CANCELLED"] == (1, 0.5)
    assert len(points) == 11


async def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And without the configuration nothing is installed or needed."""
    monkeypatch.setitem(__import__("sys").modules, "sidecar.otlp.genai", None)
    file = tmp_path / "config.yaml"
    file.write_text("otlp: {endpoint: 'http://127.0.0.1:4317'}")
    assert run(("config", "check", str(file))) == 2  # it says what serve would
    assert needs_extra("otlp.endpoint", "otel") in capfd.readouterr().err
    with pytest.raises(Misused, match=r"otlp\.endpoint needs the extra otel"):
        Sidecar(parse({"otlp": {"endpoint": "http://127.0.0.1:4317"}}, "the test"))
    assert Sidecar(parse({}, "the test")).telemetry is None


def test_an_endpoint_without_a_scheme_is_refused() -> None:
    with pytest.raises(Misused, match="write http://collector:4317"):
        parse({"otlp": {"endpoint": "collector:4317"}}, "the test")
