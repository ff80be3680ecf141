"""What is expected of answers, against the truth of the distribution that they are drawn from."""

from __future__ import annotations

from math import exp
from random import Random

import pytest

from sidecar.core.lengths import LEARNED, Lengths


def learned(limits: list[int], mean: float | None, answers: int = 3000) -> Lengths:
    """Return what was learned of answers under random limits: of exponential lengths, or of all that was allowed."""
    random, lengths = Random(1), Lengths()
    for _ in range(answers):
        limit = random.choice(limits)
        natural = limit if mean is None else max(1, round(random.expovariate(1 / mean)))
        lengths.learn(min(natural, limit), limit)
    return lengths


@pytest.mark.parametrize("limits", [[4000], [100, 4000], [20, 40, 80, 160, 2000], [30, 60, 100, 1000]])
@pytest.mark.parametrize("limit", [16, 50, 100, 400, 2000])
def test_answers_that_end_by_themselves(limits: list[int], limit: int) -> None:
    """The mean of min(length, limit) of an exponential length is mean (1 - exp(-limit / mean)), whatever was allowed.

    The last hundred answers weigh most, whose mean is off by a tenth, more where limits have cut off many of them.
    """
    mean = 100.0
    expected, _ = learned(limits, mean).expected(limit)
    assert expected == pytest.approx(mean * (1 - exp(-limit / mean)), rel=0.3)


@pytest.mark.parametrize("limits", [[64], [16, 512], [10, 100, 1000]])
@pytest.mark.parametrize("limit", [5, 64, 512])
def test_answers_that_use_all_they_may(limits: list[int], limit: int) -> None:
    """A limit is then what a client needs. Beyond the longest answer that was seen nothing is sure."""
    expected, sure = learned(limits, None).expected(limit)
    assert expected == limit
    assert sure == min(limit, max(limits))


def test_a_fraction_would_be_wrong() -> None:
    """Answers of 40 tokens under limits of 512: under 64 they have 40, not 5; under 2000 they have 40, not 156."""
    lengths = Lengths()
    for _ in range(LEARNED):
        lengths.learn(40, 512)
    assert lengths.known
    assert [lengths.expected(limit) for limit in (20, 64, 2000)] == [(20, 20), (40, 40), (40, 40)]


def test_recent_answers_weigh_more() -> None:
    """Some hundred longer answers outweigh ten thousand short ones, and what is held stays small."""
    lengths = learned([4000], 30.0, 10_000)
    for _ in range(300):
        lengths.learn(300, 4000)
    assert lengths.expected(4000)[0] == pytest.approx(300, rel=0.1)
    assert len(lengths.alike) < 40
    assert lengths.next_weight < 1e10


@pytest.mark.parametrize("limits", [[4000], [100, 4000], [20, 40, 80, 160, 2000]])
@pytest.mark.parametrize(("tokens", "limit"), [(0, 400), (50, 400), (120, 400), (120, 150)])
def test_what_is_left_of_an_answer_that_goes_on(limits: list[int], tokens: int, limit: int) -> None:
    """An exponential length has no memory: mean (1 - exp(-(limit - tokens) / mean)) are left, however long it was."""
    mean = 100.0
    left = learned(limits, mean).remaining(tokens, limit)
    assert left == pytest.approx(mean * (1 - exp(-(limit - tokens) / mean)), rel=0.4)


def test_what_is_left_of_an_answer_that_is_longer_than_all_before() -> None:
    """If those were cut off it goes on to its limit, as they would have; if they ended, it may as well double."""
    cut, ended = learned([600], None), learned([4000], 30.0)
    assert cut.remaining(850, 3000) == pytest.approx(2150)
    assert [ended.remaining(tokens, 3000) for tokens in (850, 2000, 3000)] == [850, 1000, 0]
