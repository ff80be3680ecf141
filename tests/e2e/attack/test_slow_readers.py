"""Clients that read nothing hold no seats: what they asked for is generated, and waits for them in bounded memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.core.effects import Settle
from sidecar.telling.endings import message_of
from tests.kit.emulated import running_engine
from tests.kit.kserve_clients import DUMMY
from tests.kit.serving import Serving, serving, until, write_adapters
from tests.kit.slow_readers import FRONTS, unread

SEATS, TOKENS = 4, 2000
MANY = 3 * SEATS
PATIENT: dict[str, Any] = {"client_stall_s": 3600.0}
"""So that nobody's seat comes free because its client is cancelled."""


@asynccontextmanager
async def served_by(tmp_path: Path, **record: Any) -> AsyncIterator[Serving]:
    """Serve an engine of four seats."""
    write_adapters(tmp_path / "adapters", 1)
    async with (
        running_engine(**DUMMY, max_seq_tokens=2 * TOKENS) as engine,
        serving([engine], tmp_path / "adapters", backend={"engine": {"seats": SEATS}}, **record) as served,
    ):
        yield served


@pytest.mark.parametrize("front", FRONTS)
async def test_others_are_answered_while_nobody_reads(tmp_path: Path, front: str) -> None:
    """Three times as many unread answers as seats: all seats are free for somebody else, though no client leaves."""
    async with (
        served_by(tmp_path, **PATIENT) as served,
        unread(front, served.sidecar.data_address, MANY, TOKENS, "a00"),
    ):
        gateway = served.sidecar.gateway
        await until(lambda: len(gateway.tickets) == MANY)
        assert len((await served.ask("a00", 3)).tokens) == 3
        await until(lambda: not gateway.state.requests)
        waiting = list(gateway.tickets.values())
        assert len(waiting) == MANY
        assert all(ticket.settled is not None and ticket.replies for ticket in waiting)
        assert gateway.answers.held_bytes > MANY * TOKENS
    await until(lambda: not gateway.tickets)
    assert gateway.answers.held_bytes == 0


@pytest.mark.parametrize("front", FRONTS)
async def test_an_answer_longer_than_its_buffer_is_cancelled_in_the_end(tmp_path: Path, front: str) -> None:
    """It holds its seat until then; what waited for its client is freed with it."""
    record = {"client_stall_s": 0.3, "queue": {"answer_bytes_max": 20_000}}
    async with served_by(tmp_path, **record) as served, unread(front, served.sidecar.data_address, 1, TOKENS, "a00"):
        gateway = served.sidecar.gateway
        await until(lambda: served.recorder.count(Settle) == 1)
        (ending,) = served.recorder.of(Settle)
        assert ending.reason.value == "CLIENT_STALLED"
        assert "the client read too slowly" in message_of(ending)
        await until(lambda: not gateway.tickets)
        assert gateway.answers.held_bytes == 0


@pytest.mark.parametrize("front", FRONTS)
async def test_all_answers_together_are_bounded(tmp_path: Path, front: str) -> None:
    """Where little is kept for all, one that reads is answered in full beside those that do not."""
    record = PATIENT | {"queue": {"answers_bytes_max": 60_000}}
    async with (
        served_by(tmp_path, **record) as served,
        unread(front, served.sidecar.data_address, SEATS - 1, TOKENS, "a00"),
    ):
        gateway = served.sidecar.gateway
        await until(lambda: sum(ticket.behind_since_ns is not None for ticket in gateway.tickets.values()) == SEATS - 1)
        assert len((await served.ask("a00", 500)).tokens) == 500
        assert gateway.answers.held_bytes <= 60_000 + SEATS * 2000  # a message each beyond
