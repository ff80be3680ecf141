"""Who asks for what, said in the metadata of a `Generate` call: the words that KServe's clients say there.

They were ignored, and whoever named an adapter so was answered by the base model.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from sidecar.core.events import Received
from sidecar.proto import gateway_pb2
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import aio_client, ask
from tests.kit.serving import Serving, serving, write_adapters

TOKENS = gateway_pb2.TokenIds(ids=[1, 2, 3])

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Serving]:
    folder = tmp_path_factory.mktemp("served")
    write_adapters(folder, 2)
    classes = {"classes": {"batch": {}}}
    async with (
        running_engine(compute="none", shape="tiny") as engine,
        serving([engine], folder, queue=classes) as started,
    ):
        yield started


async def tokens_of(served: Serving, metadata: dict[str, str], **fields: Any) -> list[int]:
    request = gateway_pb2.GenerateRequest(**({"tokens": TOKENS, "max_tokens": 2} | fields))
    call = served.gateway.Generate(request, metadata=tuple(metadata.items()))
    return [token async for message in call for token in message.token_ids]


async def refused(served: Serving, metadata: dict[str, str], **fields: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await tokens_of(served, metadata, **fields)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return str(caught.value.details())


def last(served: Serving) -> Received:
    return [event for event in served.recorder.events if isinstance(event, Received)][-1]


async def test_an_adapter_named_in_metadata_answers(served: Serving) -> None:
    for name in ("a00", "a01"):
        assert await tokens_of(served, {"lora-name": name}) == served.expected(name, 2) != served.expected("", 2)
    assert await tokens_of(served, {"lora-name": "a00"}, adapter="a00") == served.expected("a00", 2)


async def test_the_other_words_count_too(served: Serving) -> None:
    """Tenant, class, session and deadline, as KServe's parameters of these names do; a session is none of ours."""
    metadata = {"lora-tenant": "blue", "lora-class": "batch", "lora-session": "s1", "lora-deadline-ms": "60000"}
    await tokens_of(served, metadata)
    ours = last(served)
    await tokens_of(served, {}, tenant="blue", session="s1", deadline_ms=60_000, **{"class": "batch"})
    fields = last(served)
    async with aio_client(served.sidecar.data_address) as client:
        await ask(client, headers=metadata)
        kserve = last(served)
        await ask(client, parameters={name.replace("-", "_"): value for name, value in metadata.items()})
        parameters = last(served)
    for one in (ours, fields, kserve, parameters):
        assert (one.tenant, one.klass) == ("blue", "batch")
        assert one.deadline_ns is not None
        assert one.session == ours.session != "s1"


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"lora-nam": "a00"}, 'unknown metadata "lora-nam"; did you mean "lora-name"?'),
        ({"adapter": "a00"}, 'unknown metadata "adapter"; did you mean "lora-name"?'),
        ({"lora-name": ""}, "lora_name is empty"),
        ({"lora-deadline-ms": "soon"}, 'lora_deadline_ms is "soon"'),
        ({"lora-name": "x" * 257}, 'the metadata "lora-name" has 257 characters'),
        ({"x-request-id": "x" * 129}, "the request id has 129 characters"),
    ],
)
async def test_a_slip_does_not_reach_the_base_model(served: Serving, metadata: dict[str, str], words: str) -> None:
    """It is refused in the words that KServe's clients are told."""
    assert words in await refused(served, metadata)
    async with aio_client(served.sidecar.data_address) as client:
        assert words in (await ask(client, headers=metadata)).errors[0]


@pytest.mark.parametrize(
    ("key", "field"),
    [("lora-name", "adapter"), ("lora-tenant", "tenant"), ("lora-class", "class"), ("lora-session", "session")],
)
async def test_two_words_for_one_thing(served: Serving, key: str, field: str) -> None:
    """A request that says something else than its call is a mistake of somebody's, and no one's guess."""
    said = await refused(served, {key: "a00"}, **{field: "a01"})
    assert said == f'the request says {field} "a01" and the metadata {key} "a00"; say it once'


async def test_the_earlier_deadline_counts(served: Serving) -> None:
    for metadata, field_ms in (("1000", 3_600_000), ("3600000", 1000)):
        await tokens_of(served, {"lora-deadline-ms": metadata}, deadline_ms=field_ms)
        (at_ns,) = {last(served).deadline_ns}
        await tokens_of(served, {}, deadline_ms=1_800_000)
        assert at_ns is not None
        assert at_ns < (last(served).deadline_ns or 0)
