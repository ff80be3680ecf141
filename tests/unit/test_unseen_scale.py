"""How many tokens an event has, as it is learned by the engine's own counter while answers go past."""

from __future__ import annotations

from random import Random

import pytest

from sidecar.backends.unseen import Scale

SECONDS, STREAMS = 300, 40


def steady(several: float, share_read: float = 0.0, seed: int = 1, foreign: int = 0, is_seen: bool = False) -> Scale:
    """Let streams of 50 tokens a second go past, of which each event has `several`, and is told a second late.

    `share_read` of them are read as well. `foreign` tokens a second are others', which the gauge shows if `is_seen`.
    """
    random, scale = Random(seed), Scale()
    generated, late = 0, 0.0
    for _ in range(SECONDS):
        made = [random.randint(40, 60) for _ in range(STREAMS)]
        read = round(share_read * STREAMS)
        generated += sum(made) + foreign
        scale.counted(sum(made[:read]))
        scale.told(late)
        late = sum(made[read:]) / several
        scale.look(generated, STREAMS, is_alone=not (foreign and is_seen))
    return scale


@pytest.mark.parametrize("several", [1.0, 1.3, 8.0])
@pytest.mark.parametrize("share_read", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_near_although_it_is_told_late(several: float, share_read: float, seed: int) -> None:
    assert steady(several, share_read, seed).factor == pytest.approx(several, rel=0.04)


def test_nothing_is_learned_while_others_are_in_the_engine() -> None:
    assert steady(1.0, foreign=5_000, is_seen=True).factor == 1.0


def test_a_burst_teaches_nothing_before_it_is_told() -> None:
    """The engine has counted what nobody has told yet."""
    scale = Scale()
    scale.look(0, 0, is_alone=True)
    for second in range(1, 6):
        scale.told(500.0 * (second > 1))
        scale.look(second * 500, 10, is_alone=True)
        assert scale.factor == 1.0
    scale.told(500.0)
    scale.look(2_500, 0, is_alone=True)
    assert scale.factor == 1.0


def test_an_engine_that_restarts_or_tells_nothing() -> None:
    scale = Scale()
    for generated in (10_000, None, 5, 0, None):
        scale.told(1_000.0)
        scale.look(generated, 1, is_alone=True)
    assert scale.factor == 1.0
