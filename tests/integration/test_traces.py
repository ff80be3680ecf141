"""Traces of a serving process: off, from every front, to engines, and with a collector that is away."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from time import monotonic

import httpx
import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")


from sidecar.otlp import exporting
from sidecar.otlp.sending import STOP_S
from sidecar.proto import gateway_pb2
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import OpenStream, aio_client, core_inputs
from tests.kit.otlp import collector
from tests.kit.ports import free_port
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.trtllm_emulated import TrtllmProcess
from tests.kit.trtllm_served import entry_of
from tests.kit.vllm_emulated import VllmProcess

DUMMY = {"compute": "none", "shape": "tiny"}


def context_of(trace: str, span: str) -> dict[str, str]:
    return {"traceparent": f"00-{trace}-{span}-01"}


Context = Mapping[str, str] | Sequence[tuple[str, str]]


async def generate(served: Serving, context: Context) -> None:
    request = gateway_pb2.GenerateRequest(adapter="a00", tokens=gateway_pb2.TokenIds(ids=[1, 2]), max_tokens=2)
    metadata = tuple(context.items() if isinstance(context, Mapping) else context)
    async for _ in served.gateway.Generate(request, metadata=metadata):
        pass


async def unary(served: Serving, context: dict[str, str]) -> None:
    async with aio_client(served.sidecar.data_address) as client:
        inputs = core_inputs(2, streaming=False)
        await client.infer("tensorrt_llm", inputs, parameters={"lora_name": "a00"}, headers=context)


async def stream(served: Serving, context: dict[str, str]) -> None:
    async with aio_client(served.sidecar.data_address) as client:
        call = OpenStream(client, headers=context)
        call.send("a00", "1", 2)
        await call.take_final("1")


async def completion(served: Serving, context: Context) -> None:
    await _post(served, "completions", {"prompt": "hi"}, context)


async def chat(served: Serving, context: dict[str, str]) -> None:
    await _post(served, "chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, context)


async def _post(served: Serving, path: str, body: dict[str, object], context: Context) -> None:
    async with httpx.AsyncClient(base_url=f"http://{served.sidecar.http_address}/v1", timeout=60) as client:
        answer = await client.post(f"/{path}", json=body | {"model": "a00", "max_tokens": 2}, headers=context)
        assert answer.status_code == 200, answer.text


async def test_off_nothing_observes_and_nothing_is_sent_along(tmp_path: Path) -> None:
    """Without an endpoint no trace begins, nobody hears of endings but the log, and engines get no context."""
    write_adapters(tmp_path, 1)
    async with (
        collector() as received,
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path) as off,
        serving([engine], tmp_path, otlp={"endpoint": received.grpc_url, "metrics": False, "share": 1.0}) as on,
    ):
        assert off.sidecar.telemetry is None
        assert off.sidecar.gateway.begin_trace is None
        assert len(off.sidecar.gateway.chronicle.on_end) == len(on.sidecar.gateway.chronicle.on_end) - 1 == 1
        assert len(off.sidecar.gateway.driver._observers) == len(on.sidecar.gateway.driver._observers)
        await generate(off, context_of(token_hex(16), token_hex(8)))
        await generate(on, {})
        (span,) = await received.have(1, "text_completion a00")
        assert {each.trace for each in received.spans} == {span.trace}
        assert span.parent == ""


@pytest.mark.parametrize("front", [generate, unary, stream, completion, chat], ids=lambda front: front.__name__)
async def test_the_client_is_the_parent(tmp_path: Path, front: object) -> None:
    """From each front; the operation is named by the GenAI conventions."""
    write_adapters(tmp_path / "adapters", 1)
    trace, span = token_hex(16), token_hex(8)
    engine = (
        VllmProcess("--compute", "none") if front is chat else running_engine(**DUMMY, decoupled=front is not unary)
    )
    backend = {"adapters_dir": str(tmp_path / "shared")} if front is chat else {}
    async with (
        collector() as received,
        engine as made,
        serving(
            [made],
            tmp_path / "adapters",
            backend=backend,
            otlp={"endpoint": received.grpc_url, "metrics": False, "share": 0.0},
        ) as served,
    ):
        await front(served, context_of(trace, span))  # type: ignore[operator]
        (own,) = await received.have(1, "chat a00" if front is chat else "text_completion a00")
        assert (own.trace, own.parent, own.span.kind) == (trace, span, 2)
        assert own.about["lora.outcome"] == "ok"
        assert own.about["gen_ai.operation.name"] == ("chat" if front is chat else "text_completion")
        assert own.about["lora.peer"].startswith("127.0.0.1:")


@pytest.mark.parametrize("front", [generate, completion], ids=lambda front: front.__name__)
async def test_headers_of_a_context_that_come_twice(tmp_path: Path, front: object) -> None:
    """By https://www.w3.org/TR/trace-context/: states are one list in their order, and of two parents none is taken.

    gRPC's own library keeps one parent only, in clients and servers.
    """
    write_adapters(tmp_path, 1)
    trace, span = token_hex(16), token_hex(8)
    (parent,) = context_of(trace, span).items()
    other = ("traceparent", context_of(token_hex(16), span)["traceparent"])
    async with (
        collector() as received,
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, otlp={"endpoint": received.grpc_url, "metrics": False, "share": 1.0}) as served,
    ):
        states = [("tracestate", state) for state in ("a=1,b=2", "c=3", "d=4")]
        await front(served, [parent, *states])  # type: ignore[operator]
        (own,) = await received.have(1, "text_completion a00")
        assert (own.trace, own.parent, own.span.trace_state) == (trace, span, "a=1,b=2,c=3,d=4")
        if front is generate:
            return
        await front(served, [parent, other, parent, *states])  # type: ignore[operator]
        _, own = await received.have(2, "text_completion a00")
        assert (own.parent, own.span.trace_state) == ("", "")
        assert own.trace not in (trace, other[1].split("-")[1])


async def test_http_engines_get_the_attempts_span(tmp_path: Path) -> None:
    """vLLM and trtllm-serve read it from the header of the call."""
    heads: list[bytes] = []

    async def relayed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass a connection on to the engine, and keep what is sent there."""
        host, _, port = address.rpartition(":")
        engine_reader, engine_writer = await asyncio.open_connection(host, int(port))

        async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter, keeps: bool) -> None:
            while data := await source.read(1 << 16):
                if keeps:
                    heads.append(data)
                sink.write(data)
                await sink.drain()
            sink.close()

        await asyncio.gather(
            copy(reader, engine_writer, True), copy(engine_reader, writer, False), return_exceptions=True
        )

    write_adapters(tmp_path / "adapters", 1)
    trace, span = token_hex(16), token_hex(8)
    async with collector() as received, TrtllmProcess("--compute", "none") as engine:
        address = engine.http_address
        server = await asyncio.start_server(relayed, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        backends = [entry_of(tmp_path) | {"url": f"trtllm://127.0.0.1:{port}", "id": "trtllm-0"}]
        async with (
            server,
            serving([], tmp_path / "adapters", otlp={"endpoint": received.grpc_url}, backends=backends) as served,
        ):
            await completion(served, context_of(trace, span))
            (attempt,) = await received.have(1, "lora.attempt")
    sent = b"".join(heads)
    assert sent.count(b"traceparent") == 1
    assert f"traceparent: 00-{trace}-{attempt.id}-01\r\n".encode() in sent


async def test_a_collector_that_is_away(tmp_path: Path) -> None:
    """No request is slower or fails for it; what was not received is counted; the process still ends soon."""
    write_adapters(tmp_path, 1)
    nowhere = f"http://127.0.0.1:{free_port()}"
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, otlp={"endpoint": nowhere, "metrics": False, "share": 1.0}) as served,
    ):
        for _ in range(20):
            await generate(served, {})
        begun_s = monotonic()
        await served.sidecar.telemetry.stop()  # type: ignore[union-attr]
        assert monotonic() - begun_s < 10 * STOP_S
        figures = served.sidecar.metrics.traces()
        assert figures["sent"] == 0
        text = (await served.sidecar.metrics.render())[1].decode()
        assert 'lora_sidecar_traces_total{result="sent"} 0.0' in text


async def test_a_lasting_refusal_is_counted(tmp_path: Path) -> None:
    write_adapters(tmp_path, 1)
    async with (
        collector() as received,
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, otlp={"endpoint": received.grpc_url, "metrics": False, "share": 1.0}) as served,
    ):
        received.fails = True
        await generate(served, {})
        await until(lambda: served.sidecar.metrics.traces()["failed"] == 1)


async def test_a_lasting_failure_is_a_line_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the number of spans that nobody has; OpenTelemetry's own line for each batch is not in the log."""
    now_s = 0.0
    monkeypatch.setattr(exporting, "monotonic", lambda: now_s)
    write_adapters(tmp_path, 1)
    async with (
        collector() as received,
        running_engine(**DUMMY) as engine,
        serving([engine], tmp_path, otlp={"endpoint": received.grpc_url, "metrics": False, "share": 1.0}) as served,
    ):

        async def lines_after(requests: int, result: str) -> list[str]:
            """Return the lines that so many batches bring."""
            caplog.clear()
            figures = served.sidecar.metrics.traces
            for _ in range(requests):
                before = figures()[result]
                await generate(served, {})
                await until(lambda: figures()[result] == before + 1)  # noqa: B023
            return [
                record.getMessage()
                for record in caplog.records
                if record.name.startswith((exporting.__name__, "opent"))
            ]

        await generate(served, {})
        await until(lambda: served.sidecar.metrics.traces()["sent"] == 1)
        spans = [len(received.spans)]
        await generate(served, {})
        await until(lambda: served.sidecar.metrics.traces()["sent"] == 2)
        spans.append(len(received.spans) - spans[0])
        received.fails = True
        (line,) = await lines_after(3, "failed")
        assert f", {spans[1]} spans were dropped: " in line
        assert "not today" in line
        now_s = 61.0
        (line,) = await lines_after(2, "failed")
        assert f", {3 * spans[1]} spans were dropped: " in line
        received.fails = False
        (line,) = await lines_after(2, "sent")
        assert line.endswith(f"are received again, {spans[1]} spans were dropped")
        received.fails = True
        assert await lines_after(2, "failed") == []
