"""A word that is said twice, or where no proxy looks: an ingress sets who asks, and the sidecar must read no other."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import uvloop
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sidecar.core.events import Received
from sidecar.fronts.http.connection import HttpLimits
from sidecar.proto import gateway_pb2
from sidecar.shell.logs import NotUtf8, configure_logging
from tests.integration.test_openai_listener import exchange, listening
from tests.kit.emulated import running_engine
from tests.kit.http2 import GENERATE, INFER, raw_connection
from tests.kit.kserve_clients import CORE, DUMMY, aio_client, ask, restrict, status_of
from tests.kit.openai_house import ScriptedVllm, house
from tests.kit.serving import Serving, serving, until, write_adapters

TOKENS = gateway_pb2.TokenIds(ids=[1, 2, 3])
BODY = json.dumps({"model": "chef", "prompt": "x", "max_tokens": 4}).encode()
ASK = gateway_pb2.GenerateRequest(tokens=TOKENS, max_tokens=1)


def chunked(*headers: str, trailers: tuple[str, ...] = ()) -> bytes:
    """Return a completion in chunks, with what stands before and behind its body."""
    head = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json", "connection: close"]
    lines = "".join(f"{line}\r\n" for line in (*head, *headers, "transfer-encoding: chunked", ""))
    return (
        lines.encode()
        + b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
        + "".join(f"{t}\r\n" for t in (*trailers, "")).encode()
    )


@pytest.mark.parametrize("headers", [(), ("x-lora-tenant: guest",)], ids=["no tenant", "the ingress's tenant"])
async def test_a_tenant_in_a_trailer(tmp_path: Path, headers: tuple[str, ...]) -> None:
    """It is none: the adapter of another tenant is as if it were not there."""
    async with house(tmp_path, [ScriptedVllm()]) as served:
        await served.register("chef", allow=("kitchen",))
        port = int(served.front.address.rpartition(":")[2])
        answer = await exchange(port, chunked(*headers, trailers=("x-lora-tenant: kitchen",)))
        assert answer.startswith(b"HTTP/1.1 404"), answer
        assert not served.gateway.state.requests


async def test_trailers_without_end() -> None:
    """They are dropped, and counted as a head is."""
    async with listening(HttpLimits(head_bytes=1024)) as port:
        few = ("x-one: y",) * 10
        assert (await exchange(port, chunked(trailers=few))).endswith(BODY)
        try:
            answer = await exchange(port, chunked(trailers=("x-one: " + "y" * 120,) * 40))
        except ConnectionResetError:
            return  # it was cut off before it had read why
        assert answer.startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize(
    "name",
    ["x-lora-tenant", "x-lora-class", "x-lora-deadline-ms", "x-lora-session", "x-request-id", "authorization"],
)
async def test_a_header_given_twice(tmp_path: Path, name: str) -> None:
    """No order of two says which of them the ingress has seen, and a list of models is no exception."""
    async with house(tmp_path, [ScriptedVllm()]) as served:
        for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models")):
            twice = [(name, "100"), (name.title(), "200"), ("content-type", "application/json")]
            answer = await served.client.request(method, path, content=BODY, headers=twice)
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].endswith(f"the header {name} is given twice; send it once")
            assert answer.headers["x-request-id"] not in ("100", "200")
        assert not served.gateway.state.requests


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp("served")
    write_adapters(folder, 1)
    async with running_engine(**DUMMY) as engine, serving([engine], folder, roots=[folder]) as started:
        await restrict(started, folder / "a00", "kitchen")
        yield started


Call = Callable[[Serving, Any], Any]


async def generate(served: Serving, metadata: Any) -> None:
    async for _ in served.gateway.Generate(ASK, metadata=metadata):
        pass


async def infer(served: Serving, metadata: Any) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
    await stub.ModelInfer(service_pb2.ModelInferRequest(model_name=CORE), metadata=metadata)


async def stream(served: Serving, metadata: Any) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
    call = stub.ModelStreamInfer(metadata=metadata)  # grpc.aio shows a write that failed in place of the status
    assert await call.read() is grpc.aio.EOF


async def list_regions(served: Serving, metadata: Any) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(served.channel)
    await stub.SystemSharedMemoryStatus(service_pb2.SystemSharedMemoryStatusRequest(), metadata=metadata)


@pytest.mark.parametrize("call", [generate, infer, stream, list_regions])
@pytest.mark.parametrize("key", ["lora-tenant", "lora-name", "lora-class", "x-request-id"])
@pytest.mark.asyncio(loop_scope="module")
async def test_metadata_given_twice(served: Serving, call: Call, key: str) -> None:
    error = await status_of(call(served, ((key, "guest"), (key, "kitchen"))))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == f'the metadata "{key}" is given twice; say it once'


@pytest.mark.asyncio(loop_scope="module")
async def test_a_tenant_of_the_request_against_its_metadata(served: Serving) -> None:
    """KServe's parameter does not win over what an ingress has set; where both say the same it may stand."""
    parameters = {"lora_name": "a00", "lora_tenant": "kitchen"}
    async with aio_client(served.sidecar.data_address) as client:
        told = await ask(client, parameters=parameters, headers={"lora-tenant": "guest"})
        assert 'the request says tenant "kitchen" and the metadata lora-tenant "guest"; say it once' in told.errors[0]
        told = await ask(client, parameters=parameters, headers={"lora-tenant": "kitchen"})
        assert (told.errors, told.tokens()) == ([], served.expected("a00", 4))


@pytest.mark.asyncio(loop_scope="module")
async def test_other_words_of_the_request_stand_over_their_metadata(served: Serving) -> None:
    """A stream's metadata is the default of all its requests."""
    headers = {"lora-tenant": "kitchen", "lora-name": "nowhere", "lora-deadline-ms": "1"}
    async with aio_client(served.sidecar.data_address) as client:
        parameters = {"lora_name": "a00", "lora_deadline_ms": "60000"}
        told = await ask(client, parameters=parameters, headers=headers)
        assert (told.errors, told.tokens()) == ([], served.expected("a00", 4))


@pytest.mark.parametrize("path", [GENERATE, INFER])
@pytest.mark.parametrize("value", [b"\xe9", "é".encode(), b"\xff\xfe"])
@pytest.mark.asyncio(loop_scope="module")
async def test_a_tenant_that_is_not_ascii(served: Serving, path: str, value: bytes) -> None:
    """gRPC reads bytes that are not UTF-8 as Latin-1: a tenant that nobody has named."""
    count = sum(isinstance(event, Received) for event in served.recorder.events)
    message = ASK if path == GENERATE else service_pb2.ModelInferRequest(model_name=CORE)
    async with raw_connection(served.sidecar.data_address) as connection:
        call = connection.begin(path, (b"lora-tenant", value))
        await connection.send_whole(call, message.SerializeToString())
        ended = await connection.is_over(call)
    assert int(ended["grpc-status"]) == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert 'the metadata "lora-tenant" is not ASCII' in ended["grpc-message"]
    assert sum(isinstance(event, Received) for event in served.recorder.events) == count


@pytest.mark.asyncio(loop_scope="module")
async def test_metadata_that_is_not_utf8_writes_no_tracebacks(served: Serving) -> None:
    """One line for all of it, which gRPC would write a traceback for each of."""
    written = io.StringIO()
    writer = configure_logging(stream=written)
    try:
        async with raw_connection(served.sidecar.data_address) as connection:
            for _ in range(3):
                call = connection.begin(GENERATE, *((b"a", b"\xff"),) * 100)
                await connection.send_whole(call, ASK.SerializeToString())
                assert (await connection.is_over(call))["grpc-status"] == "0"
    finally:
        writer.stop()
    lines = [line for line in written.getvalue().splitlines() if " INFO " not in line]
    assert len(lines) == 1, lines[:5]
    assert "clients sent metadata that is not UTF-8" in lines[0]


def test_the_next_line_says_how_much_was_left_out() -> None:
    """And what else gRPC has to say there is said."""
    said = NotUtf8(every_s=60)

    def line(at_s: float, message: str = "Invalid encoding on %s") -> str:
        record = logging.LogRecord("grpc", logging.ERROR, "", 0, message, (b"\xff",), None)
        record.created = at_s
        return record.getMessage() if said.filter(record) else ""

    assert "1 values" in line(1000.0)
    assert [line(1000.0 + at) for at in range(1, 60)] == [""] * 59
    assert line(1001.0, "another %s").startswith("another")
    assert "60 values" in line(1060.0)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_client_that_asks_twice_and_leaves(tmp_path: Path, caplog: pytest.LogCaptureFixture, loop: Any) -> None:
    """What it asked first is cancelled, as if it had asked once; nothing breaks, and the second is asked of nobody."""

    async def play() -> None:
        engine = ScriptedVllm()
        async with house(tmp_path, [engine]) as served:
            host, _, port = served.front.address.rpartition(":")
            body = BODY.replace(b"chef", b"base")
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write((head + b"content-length: %d\r\n\r\n%s" % (len(body), body)) * 2)
            await until(lambda: bool(engine.running))
            writer.transport.abort()
            state = served.front._listener._server.server_state
            await until(lambda: not state.connections)
            await until(lambda: bool(engine.cancelled))  # the front hears of the client's end a moment later
            await until(lambda: not state.tasks)
            assert len(engine.forms) == len(engine.cancelled) == 1

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(play())
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
