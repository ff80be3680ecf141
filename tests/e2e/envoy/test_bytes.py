"""Answers reach the client byte by byte, however Envoy and the engine cut them, while both are as busy as they can be.

Some answers come at once, and are on their way as a whole when the sidecar closes its call; others come as fast as is
possible with most of it still to come.
"""

from __future__ import annotations

import asyncio
import random
from hashlib import sha256
from pathlib import Path

import pytest

from tests.e2e.envoy.quick_house import GATEWAYS, QuickHouse, quick_house
from tests.kit.quick_client import Answer
from tests.kit.quick_engine import SPLIT, WHOLE, Order, answer_of
from tests.kit.serving import until_async

CLIENTS = 64
ANSWERS = pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.nightly)])
UNTOLD = "ai-gateway"
"""The gateway that closes calls at the first chunk, and writes no access log that the sidecar could read."""
KINDS = 600
"""Of answers: sizes, seeds and cuts."""
MESSAGES_MAX = 8
"""That Envoy sends for an answer whose call is closed at its first chunk; one that is followed has up to 200."""


@ANSWERS
@pytest.mark.parametrize("gateway", GATEWAYS)
async def test_every_byte_is_the_engines(tmp_path: Path, gateway: str, count: int) -> None:
    """Of so many answers of 1 to 200 events none differs, and none keeps its seat where its end is told."""
    async with quick_house(tmp_path, gateway, adapters=4) as house:
        assert await damaged(house, count) == []
        if gateway != UNTOLD:
            await until_async(lambda: _is_quiet(house))
        if gateway == "lane":
            sent = await house.envoy.stats("stream_msgs_sent")
            assert 0 < sum(sent.values()) < MESSAGES_MAX * count


@pytest.mark.nightly
async def test_seats_of_ends_that_nothing_tells_come_back_together(tmp_path: Path) -> None:
    """The engine's gauge says that it has none of them."""
    async with quick_house(tmp_path, UNTOLD, adapters=4) as house:
        assert await damaged(house, KINDS) == []
        assert await house.running() > 0
        await until_async(lambda: _is_quiet(house))


async def damaged(house: QuickHouse, count: int) -> list[str]:
    """Ask for so many answers, by many clients at once; return those that were not what the engine sends."""
    numbers = iter(range(count))
    found: list[str] = []

    async def ask() -> None:
        async with house.client() as client:
            for number in numbers:
                order = order_of(number % KINDS)
                answer = await client.stream(house.names[number % len(house.names)], order.prompt, order.events)
                if not is_whole(answer, order):
                    found.append(f"{number}: {order}: {answer.status}, {len(answer.body)} bytes of {wanted(order)}")

    await asyncio.gather(*(ask() for _ in range(CLIENTS)))
    return found


def order_of(number: int) -> Order:
    """Return one of the kinds of answers."""
    chosen = random.Random(number)
    events, cut = chosen.choice((1, 2, 3, 8, 20, 60, 200)), chosen.choice(("", WHOLE, SPLIT))
    return Order(events, number + 1, cut, chosen.choice((0.0, 0.1, 0.5)))


def is_whole(answer: Answer, order: Order) -> bool:
    same = sha256(answer.body).digest() == sha256(answer_of(order)).digest()
    return answer.status == 200 and answer.is_whole and same


def wanted(order: Order) -> int:
    return len(answer_of(order))


async def _is_quiet(house: QuickHouse) -> bool:
    return await house.running() == 0
