"""Programs that were written for OpenAI's API or for vLLM itself, unmodified, through a real Envoy to a real vLLM.

Envoy carries the answers. What is right is what the engine answers directly, by the name that it has for the adapter,
and what PEFT does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.envoy.house import LANES
from tests.e2e.envoy.outside import MOST, answered_by, log_used, nothing_is_left, went_past
from tests.e2e.envoy.server import EnvoyInstalled, EnvoyServer
from tests.e2e.installed import needed
from tests.e2e.vllm.direct import http_client, inside, load, metrics, registered
from tests.e2e.vllm.fronted import Front, in_front
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.test_clients import BENCHED, EXACT, TEXT, TOKENS, USER, benchmark
from tests.e2e.vllm.toy import NAMES, Toy

FREE = {"address": "127.0.0.1:0"}
AT_ONCE = 12
"""Streams of each adapter at a time."""
DUPLEX = "duplex-duplex"
"""The lane in which every chunk crosses the sidecar, and the head is the sidecar's."""
LOG_ENDS = {"duplex-streamed", "duplex-none", "buffered-override"}
"""The lanes in which Envoy's log tells the end of a stream; in the others the sidecar sees it."""

lanes = pytest.mark.parametrize(
    "lane", [lane if lane == "duplex-streamed" else pytest.param(lane, marks=pytest.mark.nightly) for lane in LANES]
)


@pytest.fixture(autouse=True, scope="module")
def _envoy() -> EnvoyInstalled:
    return needed(EnvoyInstalled)


@dataclass
class Carried:
    """An Envoy, a sidecar that it asks, and a client of the engine's own API."""

    front: Front
    envoy: EnvoyServer
    engine: httpx.AsyncClient

    async def engines_name(self, name: str) -> str:
        """Return the name by which the engine has an adapter's current version."""
        folder = self.front.staged(name)
        (found,) = [own for own, path in (await registered(self.engine)).items() if Path(path) == folder]
        return found

    async def nothing_is_left(self) -> None:
        """Fail unless every request has left the sidecar, and the engine says the same of itself."""
        await nothing_is_left(self.front.served)
        told = await metrics(self.engine)
        assert (told.running, told.waiting, await inside(self.engine)) == (0, 0, 0)


@asynccontextmanager
async def behind_envoy(
    server: VllmServer, toy: Toy, scratch: Path, lane: str = "duplex-streamed"
) -> AsyncIterator[Carried]:
    request_mode, response_mode, needs = LANES[lane]
    listeners = {"data": FREE, "admin": FREE, "http": FREE, "probes": FREE, "endpoint_picker": FREE | needs}
    async with AsyncExitStack() as stack:
        front = await stack.enter_async_context(in_front(server, toy.adapters, scratch, listeners=listeners))
        address = front.served.sidecar.endpoint_picker_address
        envoy = await stack.enter_async_context(EnvoyServer(scratch / "envoy", address, request_mode, response_mode))
        yield Carried(front, envoy, await stack.enter_async_context(http_client(server.http_address)))


def client_of(address: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0)


async def directly(running: Carried, name: str) -> tuple[str, list[int], str]:
    """Return what the engine answers to the SDK itself: a completion's text and token ids, and a chat's text."""
    own = await running.engines_name(name)
    async with client_of(str(running.engine.base_url.netloc.decode())) as client:
        completion = await client.completions.create(model=own, prompt=TEXT, max_tokens=TOKENS, **EXACT)
        chat = await client.chat.completions.create(model=own, messages=USER, max_tokens=TOKENS, **EXACT)
    choice: Any = completion.choices[0]
    return choice.text, choice.token_ids, str(chat.choices[0].message.content)


async def streamed(client: openai.AsyncOpenAI, name: str, is_carried: bool = True) -> tuple[str, list[int]]:
    """Return text and token ids of a streamed completion; `is_carried` says that it went past the sidecar."""
    raw = await client.completions.with_raw_response.create(
        model=name, prompt=TEXT, max_tokens=TOKENS, stream=True, **EXACT
    )
    assert went_past(raw.headers) is is_carried
    parts: list[Any] = [chunk.choices[0] async for chunk in raw.parse()]
    assert parts[-1].finish_reason == "length"
    return "".join(part.text for part in parts), [token for part in parts for token in part.token_ids]


@lanes
async def test_the_asynchronous_client(either: VllmServer, toy: Toy, tmp_path: Path, lane: str) -> None:
    """Completions and chats, whole and streamed, one after another and many at once; and a model that there is not."""
    async with behind_envoy(either, toy, tmp_path, lane) as running, client_of(running.envoy.address) as client:
        told: dict[str, tuple[str, list[int]]] = {}
        for name in NAMES[:3]:
            raw = await client.completions.with_raw_response.create(model=name, prompt=TEXT, max_tokens=TOKENS, **EXACT)
            assert went_past(raw.headers)
            whole = raw.parse()
            choice: Any = whole.choices[0]
            told[name] = (choice.text, choice.token_ids)
            # Where no part of a body comes to the sidecar, the engine's own name stays.
            own = await running.engines_name(name) if lane == "duplex-none" else name
            assert (whole.model, choice.finish_reason) == (own, "length")
            assert await streamed(client, name, lane != DUPLEX) == told[name]
            chat = await client.chat.completions.create(model=name, messages=USER, max_tokens=TOKENS, **EXACT)
            events = await client.chat.completions.create(
                model=name, messages=USER, max_tokens=TOKENS, stream=True, **EXACT
            )
            said = "".join([event.choices[0].delta.content or "" async for event in events])
            assert (*told[name], said) == await directly(running, name)
            assert chat.choices[0].message.content == said
            assert choice.token_ids == toy.greedy(toy.adapters / name, choice.prompt_token_ids, TOKENS)
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="nobody", prompt=TEXT)
        assert await answered_by(running.envoy, "engines") == 4 * len(told)
        many = [name for name in told for _ in range(AT_ONCE)]
        assert await asyncio.gather(*(streamed(client, name, lane != DUPLEX) for name in many)) == [
            told[name] for name in many
        ]
        await running.nothing_is_left()
        streams = 2 * len(told) + len(many)
        assert await answered_by(running.envoy, "engines") == 2 * len(told) + streams
        if lane in LOG_ENDS:
            assert await log_used(running.front.served) >= streams * MOST


async def test_the_synchronous_client(server: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """In threads, with one connection each."""

    def ask(address: str, name: str) -> tuple[str, str]:
        with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as client:
            whole = client.completions.create(model=name, prompt=TEXT, max_tokens=TOKENS, **EXACT)
            stream = client.completions.create(model=name, prompt=TEXT, max_tokens=TOKENS, stream=True, **EXACT)
            return whole.choices[0].text, "".join(chunk.choices[0].text for chunk in stream)

    async with behind_envoy(server, toy, tmp_path) as running:
        names = NAMES[3:5]
        told = await asyncio.gather(*(asyncio.to_thread(ask, running.envoy.address, name) for name in names))
        for name, texts in zip(names, told, strict=True):
            text, _, _ = await directly(running, name)
            assert texts == (text, text)
        await running.nothing_is_left()
        assert await log_used(running.front.served) >= len(names) * MOST


@pytest.mark.parametrize("count", [BENCHED, pytest.param(20 * BENCHED, marks=pytest.mark.nightly)])
async def test_vllms_own_benchmark(server: VllmServer, toy: Toy, tmp_path: Path, count: int) -> None:
    """`vllm bench serve --lora-modules …`: every request succeeds, with the text that the engine gives it directly."""
    names = NAMES[:6]
    async with behind_envoy(server, toy, tmp_path) as running:
        result = await benchmark(running.envoy.address, toy, names, tmp_path / "carried.json", count)
        await running.nothing_is_left()
        assert await log_used(running.front.served) >= count * MOST
        assert await answered_by(running.envoy, "engines") >= count
    async with http_client(server.http_address) as engine:
        for name in names:
            (await load(engine, name, toy.adapters / name)).raise_for_status()
    direct = await benchmark(server.http_address, toy, names, tmp_path / "direct.json", count)
    for one in (result, direct):
        assert (one["completed"], one["failed"], one["errors"]) == (count, 0, [""] * count)
    assert all(result["generated_texts"])
    assert result["generated_texts"] == direct["generated_texts"]
    assert result["output_lens"] == direct["output_lens"]
    for kind, one in (("through Envoy", result), ("directly", direct)):
        print(f"{kind}: {one['request_throughput']:.1f} requests/s, {one['median_ttft_ms']:.0f} ms to the first token")
