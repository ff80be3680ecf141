"""The ranked heap against a sorted list."""

from __future__ import annotations

from itertools import islice
from random import Random

import pytest

from policies.eviction.ranking import Ranking


@pytest.mark.parametrize("seed", range(10))
def test_it_is_a_sorted_list(seed: int) -> None:
    """After any changes every key is read once in the order of (rank, key), and its rank is what was given last."""
    random, ranking, model = Random(seed), Ranking(), dict[str, int]()
    for _ in range(300):
        key = f"k{random.randrange(40)}"
        if key in model and random.random() < 0.3:
            del model[key]
            ranking.remove(key)
        else:
            model[key] = random.randrange(20)
            ranking.place(key, model[key])
        ordered = sorted(model, key=lambda key: (model[key], key))
        assert list(ranking) == ordered
        assert [ranking[key] for key in ordered] == [model[key] for key in ordered]
        assert not ordered or ranking.first() == ordered[0]


class Counted:
    """A rank that counts comparisons."""

    compared = 0

    def __init__(self, value: int) -> None:
        self.value = value

    def __lt__(self, other: Counted) -> bool:
        Counted.compared += 1
        return self.value < other.value

    def __le__(self, other: Counted) -> bool:
        Counted.compared += 1
        return self.value <= other.value


@pytest.mark.parametrize("count", [1_000, 16_000])
def test_a_change_and_the_first_few_cost_no_more_than_the_height(count: int) -> None:
    """Comparisons grow with the logarithm of the keys, for the worst of many changes."""
    random, ranking = Random(1), Ranking()
    for number in range(count):
        ranking.place(f"k{number}", Counted(number))
    most = 0
    for _ in range(500):
        Counted.compared = 0
        ranking.place(f"k{random.randrange(count)}", Counted(random.randrange(2 * count)))
        most = max(most, Counted.compared)
    assert most <= 2 * count.bit_length() + 2
    Counted.compared = 0
    assert len(list(islice(ranking, 10))) == 10
    assert Counted.compared < 200
