"""Engines that forget adapters behind the sidecar's back, under load: no client of the lane sees it.

64 adapters share engines whose caches hold four, and somebody else loads and unloads past the sidecar.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest

from sidecar.core.effects import Heal
from sidecar.lab.engine.cache import NO_DONE_TASKS
from tests.e2e.envoy.house import house
from tests.e2e.envoy.test_calls import calls, tokens_of
from tests.e2e.envoy.test_replicas import aiter_of
from tests.kit.emulated import add_lora, channel_to, core_request, output_of, random_adapter, set_parameter
from tests.kit.serving import Serving, until, write_adapters
from tests.kit.vllm_emulated import Client, unload_all

ADAPTERS, PAGES, CLIENTS, TOKENS_MAX, PAUSE_S = 64, 4, 16, 12, 0.01
CACHES = {"engine": {"device_pages": PAGES, "host_pages": PAGES, "seats": 64}}
requests = pytest.mark.parametrize("requests", [240, pytest.param(2000, marks=pytest.mark.nightly)])


@requests
@pytest.mark.parametrize("lane", ["duplex-streamed", "duplex-duplex"])
async def test_completions_are_healed(tmp_path: Path, lane: str, requests: int) -> None:
    names = write_adapters(tmp_path / "adapters", ADAPTERS)
    options = "--max-cpu-loras", str(PAGES)
    async with house(tmp_path, names, lane, engines=2, options=options, backend=CACHES) as running:

        async def ask(name: str, tokens: int, is_stream: bool) -> None:
            if is_stream:
                answer = await running.stream(name, tokens)
                assert answer.status == 200, answer.raw
                assert answer.is_complete
                assert answer.token_ids == running.tokens_of(name, tokens)
            else:
                whole = await running.whole(name, tokens)
                assert whole.status_code == 200, whole.text
                assert whole.json()["choices"][0]["token_ids"] == running.tokens_of(name, tokens)

        async with (
            Client(running.engines[0].http_address) as one,
            Client(running.engines[1].http_address) as other,
            beside(partial(unload_all, one), partial(unload_all, other)),
        ):
            await ask_all(names, requests, ask)
        await quiet(running.served)
        assert healed(running.served)["engine_miss"] >= requests // 20


@requests
@pytest.mark.parametrize("lane", ["duplex-streamed", "duplex-duplex"])
async def test_streams_of_kserve_are_healed(tmp_path: Path, lane: str, requests: int) -> None:
    """Each has one request, after which its client closes its side. The engine takes time: its cache gets full."""
    names = write_adapters(tmp_path / "adapters", ADAPTERS)
    caches = {"lora_host_pages": PAGES, "lora_device_pages": PAGES}
    async with calls(tmp_path, lane, time_scale=0.5, **caches) as running:

        async def ask(name: str, tokens: int, _: bool) -> None:
            assert tokens_of(await running.stream(name, tokens)) == running.served.expected(name, tokens)

        async with channel_to(running.engine.grpc_address) as stub, beside(crowding(stub)):
            await ask_all(names, requests, ask)
        await quiet(running.served)
        assert healed(running.served)["engine_miss"] >= requests // 20


@requests
@pytest.mark.parametrize("lane", ["duplex-streamed", "duplex-duplex"])
async def test_unary_calls_of_kserve_are_healed(tmp_path: Path, lane: str, requests: int) -> None:
    names = write_adapters(tmp_path / "adapters", ADAPTERS)
    caches = {"lora_host_pages": PAGES, "lora_device_pages": PAGES}
    async with calls(tmp_path, lane, decoupled=False, **caches) as running:

        async def ask(name: str, tokens: int, _: bool) -> None:
            request = core_request("hello", tokens, request_id="mine")
            set_parameter(request, "lora_name", name)
            answer = await running.stub.ModelInfer(request, timeout=60)
            assert output_of(answer, "output_ids").ravel().tolist() == running.served.expected(name, tokens)
            assert answer.id == "mine"

        async with channel_to(running.engine.grpc_address) as stub, beside(crowding(stub)):
            await ask_all(names, requests, ask)
        await quiet(running.served)
        assert healed(running.served)["engine_miss"] >= requests // 20


async def ask_all(names: Sequence[str], requests: int, ask: Callable[[str, int, bool], Awaitable[None]]) -> None:
    """Have clients ask, each its next request once the one before is answered; half of them for an eighth of the names.

    What nobody believes to be loaded cannot be missed.
    """
    random = Random(7)
    wanted = iter(
        [
            (names[int(len(names) * random.random() ** 3)], random.randint(1, TOKENS_MAX), random.random() < 0.5)
            for _ in range(requests)
        ]
    )

    async def client() -> None:
        for each in wanted:
            await ask(*each)

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client())


def crowding(stub: Any) -> Callable[[], Awaitable[None]]:
    """Return what asks a Triton for another adapter of our own each time, which it loads in the place of others.

    It asks past the sidecar, which heals nothing for it: while all adapters there are in use the cache is full for it.
    """
    numbers, weights = count(1), random_adapter(1)

    async def crowd() -> None:
        request = add_lora(core_request("hi", 1), next(numbers), weights)
        messages = [message async for message in stub.ModelStreamInfer(aiter_of(request))]
        assert NO_DONE_TASKS in messages[-1].error_message or tokens_of(messages)

    return crowd


@asynccontextmanager
async def beside(*strays: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Do some things again and again beside a block; one that fails fails it."""
    is_over = asyncio.Event()

    async def again(stray: Callable[[], Awaitable[None]]) -> None:
        while not is_over.is_set():
            await stray()
            await asyncio.sleep(PAUSE_S)

    async with asyncio.TaskGroup() as group:
        for stray in strays:
            group.create_task(again(stray))
        try:
            yield
        finally:
            is_over.set()


def healed(served: Serving) -> Counter[str]:
    """Return how many faults were healed, by kind."""
    return Counter(effect.reason for effect in served.recorder.effects if isinstance(effect, Heal))


async def quiet(served: Serving) -> None:
    """Wait until no request is left, and with it no seat and no pin."""
    state = served.state
    await until(lambda: not state.requests)
    for backend in state.backends.values():
        assert not backend.running
        assert not backend.kv_reserved
        assert not any(slot.running for slot in backend.slots.values())
    assert not any(entry.pins for entry in state.store.entries.values())
