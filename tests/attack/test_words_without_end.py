"""Tenants, sessions, ids, classes and names of megabytes, or of what terminals and logs act on.

Twelve tenants of 20 MB made `/metrics` 503 MB, and the journal passed its budget. What is sent here is smaller than
that only to be quick: what is kept of it must be nothing at all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tritonclient.grpc import service_pb2

from sidecar.backends.api import Ticket
from sidecar.core.events import Received
from sidecar.errors import Refused
from sidecar.proto import admin_pb2, gateway_pb2
from sidecar.shell.requests import RequestFacts
from tests.kit.emulated import channel_to, core_request, running_engine, set_parameter
from tests.kit.identities import HOSTILE, REAL
from tests.kit.openai_house import ScriptedVllm, house
from tests.kit.scripted_backend import PAYLOAD
from tests.kit.serving import Serving, serving, write_adapters

LONG = "t" * 1_000_000
TOKENS = gateway_pb2.TokenIds(ids=[1, 2, 3])
FIELDS = ("adapter", "tenant", "class", "session", "request_id")
DUMMY = {"compute": "none", "shape": "tiny"}


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp("served")
    write_adapters(folder / "adapters", 1)
    async with (
        running_engine(**DUMMY) as engine,
        serving([engine], folder / "adapters", roots=[folder], data_directory=str(folder / "data")) as started,
    ):
        yield started


async def refusal(call: Any) -> tuple[grpc.aio.AioRpcError, Any]:
    """Return the error that a call ends with, and its ErrorInfo."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    status, info = rpc_status.from_call(caught.value), error_details_pb2.ErrorInfo()
    assert status is not None
    assert status.details[0].Unpack(info)
    return caught.value, info


def generate(served: Serving, metadata: tuple[tuple[str, str], ...] = (), **fields: Any) -> Any:
    fields = {"adapter": "a00", "tokens": TOKENS, "max_tokens": 1} | fields
    return served.gateway.Generate(gateway_pb2.GenerateRequest(**fields), metadata=metadata)


def arrived(served: Serving) -> int:
    return sum(isinstance(event, Received) for event in served.recorder.events)


@pytest.mark.parametrize("field", FIELDS)
async def test_generate_with_a_field_of_a_megabyte(served: Serving, field: str) -> None:
    """It is refused by name, before the core, the journal and the metrics hear of it, and nothing of it is said."""
    before = arrived(served)
    error, info = await refusal(generate(served, **{field: LONG}))
    assert (error.code(), info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert "1000000 characters" in (error.details() or "")
    assert len(error.details() or "") < 300
    assert arrived(served) == before
    _, metrics = await served.sidecar.metrics.render()
    assert b"tttt" not in metrics


@pytest.mark.parametrize("word", HOSTILE)
async def test_generate_with_a_tenant_that_writes_elsewhere(served: Serving, word: str) -> None:
    """Line breaks, escapes, marks that turn text around, blanks that get lost."""
    before = arrived(served)
    error, _ = await refusal(generate(served, tenant=word))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.details() or "").isprintable()
    assert arrived(served) == before


@pytest.mark.parametrize("word", REAL)
async def test_real_identities_are_answered(served: Serving, word: str) -> None:
    """As tenant, session and id; the id comes back as it is where it may be a word of 128 characters."""
    request_id = word if len(word) <= 128 else ""
    answer = await served.ask("a00", 1, tenant=word, session=word, request_id=request_id)
    assert answer.tokens == served.expected("a00", 1)
    assert answer.origins[0].request_id == (request_id or answer.origins[0].request_id)
    received = [event for event in served.recorder.events if isinstance(event, Received)][-1]
    assert received.tenant == word
    assert word not in received.session
    _, metrics = await served.sidecar.metrics.render()
    shown = word.replace("\\", "\\\\").replace('"', '\\"')
    assert f'tenant="{shown}"'.encode() in metrics


@pytest.mark.parametrize("name", ["lora_name", "lora_tenant", "lora_class", "lora_session", "lora_deadline_ms"])
async def test_kserve_with_a_parameter_of_a_megabyte(served: Serving, name: str) -> None:
    before = arrived(served)
    async with channel_to(served.sidecar.data_address) as stub:
        request = core_request()
        set_parameter(request, name, LONG)
        (answer,) = [answer async for answer in stub.ModelStreamInfer(iter([request]))]
    assert f'[INVALID_REQUEST] the parameter "{name}" has 1000000 characters' in answer.error_message
    assert len(answer.error_message) < 300
    assert arrived(served) == before


async def test_kserve_with_a_region_of_a_megabyte(served: Serving) -> None:
    """Its name and key are kept for as long as the server may forget the region."""
    async with channel_to(served.sidecar.data_address) as stub:
        for request in (
            service_pb2.SystemSharedMemoryRegisterRequest(name=LONG, key="/k", byte_size=1),
            service_pb2.SystemSharedMemoryRegisterRequest(name="r", key=LONG, byte_size=1),
            service_pb2.SystemSharedMemoryRegisterRequest(name="two\nlines", key="/k", byte_size=1),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=r"the region's (name|key) has") as caught:
                await stub.SystemSharedMemoryRegister(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_kserve_with_an_id_of_a_megabyte(served: Serving) -> None:
    """It is neither answered nor echoed."""
    before = arrived(served)
    async with channel_to(served.sidecar.data_address) as stub:
        for client_id in (LONG, "i" * 129, "a\nb"):
            request = core_request(request_id=client_id)
            (answer,) = [answer async for answer in stub.ModelStreamInfer(iter([request]))]
            assert "[INVALID_REQUEST] the request id has" in answer.error_message
            assert answer.infer_response.id == ""
            assert len(answer.SerializeToString()) < 500
    assert arrived(served) == before


@pytest.mark.parametrize("key", ["x-lora-tenant", "x-lora-class", "x-lora-session", "x-request-id"])
async def test_openai_with_a_header_that_is_too_long(tmp_path: Path, key: str) -> None:
    """And with one that is not UTF-8: two that differ would be the same."""
    async with house(tmp_path, [ScriptedVllm()]) as there:
        body = {"model": "base", "prompt": "x"}
        for value in (b"t" * 4097, b"caf\xe9"):
            response = await there.client.post("/v1/completions", json=body, headers={key: value})
            assert response.status_code == 400
            assert f"the header {key} " in response.json()["error"]["message"]
            assert len(response.headers["x-request-id"]) == 32


async def test_another_replica_passes_on_what_is_too_long(served: Serving) -> None:
    """An older one may not look: what it passes on is looked at here, too."""
    before, gateway = arrived(served), served.sidecar.gateway
    for facts in (RequestFacts("a00", tenant=LONG), RequestFacts(LONG), RequestFacts("a00", session=LONG)):
        with pytest.raises(Refused, match="has 1000000 characters"):
            gateway.submit_here(facts, lambda number: Ticket(number, PAYLOAD, "", gateway.answers))
    with pytest.raises(Refused, match="the request id has 1000000 characters"):
        gateway.submit_here(RequestFacts("a00"), lambda number: Ticket(number, PAYLOAD, LONG, gateway.answers))
    assert not gateway.tickets
    assert arrived(served) == before


async def test_an_operator_allows_whom_nobody_can_be(served: Serving) -> None:
    """A tenant on an allow list that no request can say is refused at registration, and so are labels without end."""
    path = served.state.versions[served.state.names["a00"].digest].origin
    for more in ({"allow": ["two\nlines"]}, {"allow": [LONG]}, {"labels": {"note": LONG}}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.adapters.Register(admin_pb2.RegisterRequest(name="x", path=str(path), **more))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "x: " in (caught.value.details() or "")
    assert "x" not in served.state.names
