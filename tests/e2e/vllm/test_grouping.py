"""What late binding and grouping gain at an engine with two slots, and that no cold adapter pays for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from sidecar.core.effects import Settle
from tests.e2e.vllm.direct import at_once, complete, http_client, inside, load, measured
from tests.e2e.vllm.fronted import SEATS, Front, ask, in_front
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import NAMES, Toy, prompt

pytestmark = pytest.mark.nightly

REQUESTS = 128
TOKENS = 128
PROMPT = 8
GAIN_MIN = 2.0
"""Over a client that sends the adapters round robin and keeps as many in flight as the sidecar does."""
SHARE_MIN = 0.97
"""Of what the engine makes of all requests at once, when it sees them all and regroups them itself."""
HOT, COLD = NAMES[:2], NAMES[2]
HOT_REQUESTS = 480
HOT_TOKENS = 32
HOT_CLIENTS = 24


async def register(client: httpx.AsyncClient, toy: Toy, names: list[str]) -> None:
    for name in names:
        (await load(client, name, toy.adapters / name)).raise_for_status()


async def test_tokens_per_engine_step(either: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """128 requests of 16 adapters in the worst order, all submitted at once: the engine is as full as it can be."""
    order = [(NAMES[number % len(NAMES)], prompt(number, PROMPT)) for number in range(REQUESTS)]
    async with http_client(either.http_address) as direct:
        await register(direct, toy, NAMES)
        asks = [partial(complete, direct, name, asked, TOKENS) for name, asked in order]
        async with measured(direct) as robin:
            expected = await at_once(SEATS, asks)
        async with measured(direct) as whole:
            assert await submitted(either, asks, lambda: inside(direct)) == expected
        async with in_front(either, toy.adapters, tmp_path) as front:
            # So that none has to prove itself yet.
            await at_once(SEATS, [partial(ask, front.client, name, prompt(0, PROMPT), 1) for name in NAMES])
            asks = [partial(ask, front.client, name, asked, TOKENS) for name, asked in order]
            async with measured(direct) as ours:
                told = await submitted(either, asks, partial(_queued, front))
    assert [one.tokens for one in told] == expected
    print(f"\nround robin, {SEATS} in flight: {robin}")
    print(f"all {REQUESTS} at once:          {whole}")
    print(f"through the sidecar:      {ours}")
    gain, share = ours.tokens_per_step / robin.tokens_per_step, ours.tokens_per_step / whole.tokens_per_step
    print(f"{gain:.2f} times round robin, {share:.3f} of all at once")
    assert robin.tokens == whole.tokens == ours.tokens
    assert gain >= GAIN_MIN
    assert share >= SHARE_MIN


async def submitted(server: VllmServer, asks: list[Any], taken: Callable[[], Awaitable[int]]) -> list[Any]:
    """Ask all at once: the engine makes no step before the last one has been taken in."""
    async with server.engine_held():
        answers = asyncio.gather(*(one() for one in asks))
        while await taken() < len(asks):
            await asyncio.sleep(0.01)
    return await answers


async def _queued(front: Front) -> int:
    return len(front.served.state.requests)


class Hot:
    """Clients that ask for two adapters in turn, each again as soon as it is answered, until all has been asked.

    Lengths differ: an adapter's answers never all end in one step.
    """

    def __init__(self, clients: int, ask_one: Callable[[str, int], Awaitable[Any]]) -> None:
        self._ask_one = ask_one
        self._numbers = iter(range(HOT_REQUESTS))
        self.answered = 0
        self._tasks = [asyncio.create_task(self._ask_on()) for _ in range(clients)]

    async def under_way(self) -> None:
        """Return when a tenth of it is done."""
        while self.answered < HOT_REQUESTS / 10:
            await asyncio.sleep(0.01)

    async def ended(self) -> None:
        await asyncio.gather(*self._tasks)

    async def _ask_on(self) -> None:
        for number in self._numbers:
            await self._ask_one(HOT[number % 2], HOT_TOKENS // 2 + number * 7 % HOT_TOKENS)
            self.answered += 1


async def test_a_cold_adapter_beside_two_hot_ones(server: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """The bare engine serves it when the hot load has ended; the sidecar within the bound that it gave.

    The bare engine is given all of the load at the beginning, so that how fast its clients are makes no difference.
    """
    asked = prompt(1, PROMPT)
    async with http_client(server.http_address) as direct:
        await register(direct, toy, NAMES[:3])
        hot = Hot(HOT_REQUESTS, lambda name, tokens: complete(direct, name, asked, tokens))
        await hot.under_way()
        before = hot.answered
        await complete(direct, COLD, asked, 4)
        waited = (hot.answered - before) / (HOT_REQUESTS - before)
        await hot.ended()
    print(f"\ndirectly: the cold request waited for {waited:.2f} of the hot load that was left")
    assert waited >= 0.9
    patient = {"classes": {"default": {"patience_s": 1.0}}}
    async with in_front(server, toy.adapters, tmp_path, queue=patient) as front:
        hot = Hot(HOT_CLIENTS, lambda name, tokens: ask(front.client, name, asked, tokens))
        await hot.under_way()
        before = hot.answered
        told = await ask(front.client, COLD, asked, 4)
        waited = (hot.answered - before) / (HOT_REQUESTS - before)
        await hot.ended()
        assert told.error == ""
        assert told.tokens == toy.greedy(toy.adapters / COLD, asked, 4)
        (settled,) = [one for one in front.served.recorder.of(Settle) if one.name == COLD]
    print(
        f"through the sidecar: for {waited:.2f} of it, {settled.queue_ns / 1e9:.2f} s of a bound of "
        f"{(settled.bound_ns or 0) / 1e9:.2f} s"
    )
    assert not settled.voided
    assert settled.bound_ns is not None
    assert settled.queue_ns <= settled.bound_ns
