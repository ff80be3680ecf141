"""What nobody knows is not told as 0, and a saturated engine's pace is known within twenty seconds."""

from __future__ import annotations

import pytest

from sidecar.core import events as ev
from sidecar.core import promising
from sidecar.core.config import ClassLimit, CoreConfig
from sidecar.telling.pool import backend_message
from tests.kit.corekit import MS, SECOND, World, facts_of

FOR_EVER = {"default": ClassLimit(queue_wait_ns_max=1_000_000 * SECOND)}
REPORT_NS = 100 * MS


@pytest.fixture
def world() -> World:
    """Return an engine of two seats whose pace nobody has told, with ten requests."""
    world = World(CoreConfig(seat_slack=0.0, classes=FOR_EVER), engines=0)
    world.add_engine("b0", facts_of(seats=2)).silent = True
    for _ in range(10):
        world.send(output_tokens=20_000)
    return world


def predicted_ns(world: World) -> int | None:
    shown = backend_message(world.core.state, "b0", world.now_ns)
    return round(shown.predicted_wait_s * 1e9) if shown.HasField("predicted_wait_s") else None


def test_a_guess_is_not_told(world: World) -> None:
    """Eight wait for an engine that has yet to show how fast it is."""
    assert predicted_ns(world) is None


@pytest.mark.parametrize("step_ms", [5, 20, 60, 200])
def test_a_saturated_engine_is_known_within_twenty_seconds(world: World, step_ms: int) -> None:
    """Ten times faster or slower than is usual: from its steps it is known how long one waits, and about right."""
    backend = world.core.state.backends["b0"]
    tokens = 0.0
    for _ in range(20 * SECOND // REPORT_NS):
        world.run(for_ns=REPORT_NS)
        tokens += REPORT_NS / MS / step_ms
        if tokens >= 1:
            world.feed(ev.Progress("b0", dict.fromkeys(backend.running, int(tokens))))
        tokens -= int(tokens)
    assert promising.wait_is_known(backend)
    assert predicted_ns(world)


def test_one_token_answers_say_it_too() -> None:
    """Adapters that classify: no request is ever seen to step twice, and what its runs took is enough."""
    world = World(CoreConfig(seat_slack=0.0, classes=FOR_EVER), engines=0)
    world.add_engine("b0", facts_of(seats=2)).silent = True
    for _ in range(1000):
        world.send(output_tokens=1)
    backend = world.core.state.backends["b0"]
    for _ in range(200):
        world.run(for_ns=REPORT_NS)
        for request in list(backend.running):
            world.feed(ev.FirstToken(request, 1))
            world.feed(ev.RunEnded(request, 1, 1))
    waits_s = len(backend.queued) * REPORT_NS / SECOND / 2
    assert predicted_ns(world) == pytest.approx(waits_s * SECOND, rel=0.3)
