"""Bodies that take much longer to read than to send, and large ones beside everybody else's messages."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.errors import Refused
from sidecar.fronts.intake import LARGE_BODY_BYTES, Intake, IntakeLimits
from sidecar.fronts.openai.body import VALUES_MAX, read_body

MIB = 1 << 20


@pytest.mark.parametrize("value", ["[]", "{}", "1", '{"a":[1]}'])
def test_more_values_than_are_read(value: str) -> None:
    """It is refused by how many there are, before one is read; as many token ids as engines take are not."""
    values = ",".join([value] * (VALUES_MAX + 1))
    body = f'{{"model": "a", "prompt": "x", "more": [{values}]}}'
    with pytest.raises(Refused, match="commas and opening brackets"):
        read_body(body.encode())
    read_body(b'{"model": "a", "prompt": [%s]}' % b",".join([b"7"] * MIB))


def test_a_long_text_has_few_values() -> None:
    """Sixteen megabytes of prose are read."""
    read_body(b'{"model": "a", "prompt": "%s"}' % (b"Well, then; and so on, and so on. " * (16 * MIB // 34)))


async def test_large_bodies_leave_half_of_the_room_to_others() -> None:
    """As many as fit in the half are let in, and the others wait for each other; a message and a small body do not."""
    intake = Intake(IntakeLimits(bytes_max=64 * MIB, message_bytes=16 * MIB))
    inside = 0
    over = asyncio.Event()

    async def read_for_long() -> None:
        nonlocal inside
        async with intake.body(8 * MIB) as body:
            inside += 1
            body.count(8 * MIB)
            body.has_come()
            await over.wait()
            inside -= 1

    readers = [asyncio.create_task(read_for_long()) for _ in range(6)]
    await asyncio.sleep(0.3)
    assert inside == intake.limits.read_bytes_max // 2 // (8 * MIB)
    async with asyncio.timeout(10), intake.body(LARGE_BODY_BYTES) as small:
        small.count(LARGE_BODY_BYTES)
        small.has_come()
    with intake.call(None) as call:
        async with asyncio.timeout(10):
            await intake.one(call, lambda: asyncio.sleep(0, b"message"))
    over.set()
    await asyncio.gather(*readers)
    assert inside == 0


async def test_a_large_body_whose_client_left_while_it_waited_takes_no_room() -> None:
    intake = Intake(IntakeLimits(bytes_max=64 * MIB, message_bytes=16 * MIB))
    half = intake.limits.read_bytes_max // 2

    async def hold(until: asyncio.Event) -> None:
        async with intake.body(half) as body:
            body.count(half)
            body.has_come()
            await until.wait()

    over = asyncio.Event()
    first = asyncio.create_task(hold(over))
    await asyncio.sleep(0.05)
    left = asyncio.create_task(hold(over))
    await asyncio.sleep(0.05)
    left.cancel()
    over.set()
    await first
    async with asyncio.timeout(10):
        await hold(over)
