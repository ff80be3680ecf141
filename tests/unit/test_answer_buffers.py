"""What waits for slow clients: bounds, who is stopped first, and that all of it is freed."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from sidecar.backends.api import WRITE_BYTES, Reply, Ticket
from sidecar.backends.buffers import REPLY_BYTES, AnswerBuffers
from tests.kit.scripted_backend import PAYLOAD

RAW = bytes(1000 - REPLY_BYTES)
"""A reply that counts as a thousand bytes."""


def tickets_of(buffers: AnswerBuffers, count: int) -> list[Ticket]:
    return [Ticket(number, PAYLOAD, "", buffers) for number in range(1, count + 1)]


def fill(ticket: Ticket, replies_max: int = 10_000) -> int:
    """Deliver as an engine does, until there is no room; return how many replies it were."""
    for count in range(replies_max):
        if not ticket.has_room:
            return count
        ticket.deliver(Reply(RAW, None, False))
    return replies_max


def test_an_answer_has_a_bound_of_its_own() -> None:
    (ticket,) = tickets_of(AnswerBuffers(10_000, 1_000_000), 1)
    assert fill(ticket) == 10


@given(st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_the_sum_stays_within_its_bound(asked: list[int]) -> None:
    """However many there are, and in whatever order they come; but for a reply each, so that none stands still."""
    buffers = AnswerBuffers(50_000, 200_000)
    for ticket, count in zip(tickets_of(buffers, len(asked)), asked, strict=True):
        assert fill(ticket, count) >= 1
    assert buffers.held_bytes <= 200_000 + 1000 * len(asked)


async def test_those_furthest_behind_are_stopped_first() -> None:
    """When little is left for all, one that takes what comes goes on, beside others that have been stopped."""
    buffers = AnswerBuffers(80_000, 100_000)
    behind, keeps_up = tickets_of(buffers, 2)
    fill(behind)
    assert not behind.has_room
    for _ in range(100):
        assert keeps_up.has_room
        keeps_up.deliver(Reply(RAW, None, False))
        await keeps_up.next()


async def test_a_stopped_answer_goes_on_when_half_is_taken() -> None:
    """Not at each message: to stop and go costs a message between replicas."""
    (ticket,) = tickets_of(AnswerBuffers(10_000, 1_000_000), 1)
    fill(ticket)
    going_on = asyncio.create_task(ticket.room())
    await asyncio.sleep(0)
    assert ticket.behind_since_ns is not None
    for _ in range(5):  # the last one taken is still being written
        await ticket.next()
        await asyncio.sleep(0)
        assert not going_on.done()
    await ticket.next()
    await going_on
    assert ticket.behind_since_ns is None


async def test_what_is_being_written_still_counts() -> None:
    """A front that has taken much and waits for its client has not made room for more."""
    buffers = AnswerBuffers(1 << 20, 1 << 20)
    (ticket,) = tickets_of(buffers, 1)
    fill(ticket)
    held = buffers.held_bytes
    await ticket.next()
    taken = 1
    while ticket.another() is not None:
        taken += 1
    assert buffers.held_bytes == held
    assert WRITE_BYTES <= taken * 1000 < WRITE_BYTES + 1000
    await ticket.next()
    assert buffers.held_bytes == held - taken * 1000


def test_what_waits_for_a_client_that_left_is_freed() -> None:
    """And what its engine still says is not kept."""
    buffers = AnswerBuffers(10_000, 1_000_000)
    (ticket,) = tickets_of(buffers, 1)
    fill(ticket)
    ticket.drop()
    ticket.deliver(Reply(RAW, None, True))
    assert (buffers.held_bytes, len(ticket.replies)) == (0, 0)
