"""The bench's own arithmetic: what a figure is judged by, and that bytes on the wire are counted."""

from __future__ import annotations

import asyncio

import pytest

from tests.bench.figures import Figure, percentile
from tests.bench.forwarder import Forwarder
from tests.bench.large import FORTY_MB, THREE_HUNDRED_MB


@pytest.mark.parametrize(
    ("judged_by", "goal", "is_met"),
    [
        ("ratio", 1.2, True),
        ("ratio", 1.1, False),
        ("difference", 2, True),
        ("difference", 1, False),
        ("value", 11, False),
    ],
)
def test_a_figure_is_judged_by_what_its_goal_bounds(judged_by: str, goal: float, is_met: bool) -> None:
    """12 beside 10 is 1.2 times as much, 2 more, and 12."""
    figure = Figure("f", 12, "ms", 10, "r", judged_by, goal)  # type: ignore[arg-type]
    assert figure.is_met is is_met
    assert figure.record()["met"] is is_met


def test_a_figure_without_a_goal_or_a_reference_is_not_judged() -> None:
    """No goal: nothing to meet. A ratio to nothing: none."""
    assert Figure("f", 1, "ms", 2).is_met is None
    assert Figure("f", 1, "ms", judged_by="ratio", goal=1).is_met is None


def test_a_percentile_is_one_of_the_values() -> None:
    """The 99th of a hundred values is the largest but one at most."""
    assert percentile([float(value) for value in range(100)], 0.99) == 99
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2


def test_the_large_adapters_weigh_what_their_names_say() -> None:
    """40 and 300 MB packed, within a tenth."""
    assert FORTY_MB.size_bytes == pytest.approx(40e6, rel=0.1)
    assert THREE_HUNDRED_MB.size_bytes == pytest.approx(300e6, rel=0.1)


async def test_the_forwarder_counts_both_ways() -> None:
    """What an echo server gets through it, and gives back, is counted."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(5))
        writer.write_eof()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Forwarder(f"127.0.0.1:{port}") as forwarder:
            host, _, own_port = forwarder.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(own_port))
            writer.write(b"hello")
            assert await reader.read() == b"hello"
            writer.close()
            await writer.wait_closed()
            assert (forwarder.sent_bytes, forwarder.received_bytes) == (5, 5)
