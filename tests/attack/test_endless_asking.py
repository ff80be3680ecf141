"""A client asks for a million tokens: the engine gives what it can, and nobody else is promised worse for it."""

from __future__ import annotations

import pytest

from sidecar.core.config import CoreConfig
from sidecar.core.lengths import LEARNED
from sidecar.core.pace import Pace
from sidecar.errors import Reason
from tests.kit.corekit import SECOND, World, facts_of, with_facts

PACE = Pace(fixed_ns=20_000_000, seat_ns=0.0, context_token_ns=0.0, prompt_token_ns=0.0)
SEATS = 2
ASKED = 1_000_000


def world_of(sequence_tokens_max: int | None, **config: object) -> World:
    """Return an engine of two seats and 20 ms a step, which answers nothing by itself."""
    facts = with_facts(facts_of(seats=SEATS), pace=PACE, sequence_tokens_max=sequence_tokens_max)
    world = World(CoreConfig(seat_slack=0.0, **config), engines=0)  # type: ignore[arg-type]
    world.add_engine("b0", facts).silent = True
    return world


@pytest.mark.parametrize("sequence_tokens_max", [4096, None])
def test_nobody_else_is_refused(sequence_tokens_max: int | None) -> None:
    """Three requests for a million tokens wait; another tenant's is admitted, and is told to wait for a moment."""
    world = world_of(sequence_tokens_max)
    for _ in range(SEATS):
        world.send(tenant="honest", output_tokens=10)
    for _ in range(3):
        world.send(tenant="greedy", output_tokens=ASKED)
    honest = world.send(tenant="honest", output_tokens=10)
    assert honest not in world.settled
    promise = world.core.state.requests[honest].promise
    assert promise is not None
    assert promise.expected_ns < 60 * SECOND


def test_what_is_asked_counts_as_what_the_engine_can_give() -> None:
    """Of a million tokens after a prompt of ten as many count as the engine's longest sequence has left."""
    world = world_of(4096)
    requests = [world.send(output_tokens=asked) for asked in (ASKED, 4086, 100)]
    counted = [world.core.state.requests[request].view.output_tokens_max for request in requests]
    assert counted == [4086, 4086, 100]


def test_the_queue_is_not_full_of_what_nobody_can_give() -> None:
    """A limit of tokens that wait is not used up by one request for more than any engine gives."""
    world = world_of(4096, queued_tokens_max=20_000)
    for _ in range(SEATS + 1):
        world.send(tenant="greedy", output_tokens=ASKED)
    assert world.send(tenant="honest") not in world.settled


def test_a_flood_of_honest_size_still_fills_its_own_share() -> None:
    """Who floods is told so: its own wait grows with what it has waiting, and is refused past its class's limit."""
    world = world_of(4096)
    for _ in range(LEARNED):
        world.core.state.base_lengths.learn(4000, 4000)  # that answers use what they may is known
    sent = [world.send(tenant="greedy", output_tokens=4000) for _ in range(100)]
    refused = [request for request in sent if request in world.settled]
    assert refused
    assert {world.settled[request].reason for request in refused} == {Reason.QUEUE_FULL}
    assert world.send(tenant="honest", output_tokens=10) not in world.settled
