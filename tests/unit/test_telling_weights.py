"""What operators read of an adapter's weights after evict, unregister and prefetch."""

from __future__ import annotations

import pytest

from sidecar.core.enums import Fate, Tier
from sidecar.core.misfits import Draining, Placed
from sidecar.telling.weights import told_at, told_of_store

WORDS = {
    Placed(Fate.ABSENT, Tier.MEMORY): "not held",
    Placed(Fate.ABSENT, backend="b0"): "not resident",
    Placed(Fate.GONE, Tier.MEMORY): "dropped",
    Placed(Fate.GONE, Tier.DISK): "deleted",
    Placed(Fate.GONE, backend="b0"): "unloaded",
    Placed(Fate.GONE, Tier.MEMORY, is_pinned=True): "dropped; it is pinned, so its next use brings it back to stay",
    Placed(Fate.GONE, backend="b0", lingers=True): (
        "unloaded; vLLM keeps its weights in memory until it evicts them (vllm#54839)"
    ),
    Placed(Fate.IN_USE, Tier.DISK): "in use: deleted as soon as its users are done",
    Placed(Fate.IN_USE, backend="b0"): "in use: unloaded as soon as its users are done",
    Placed(Fate.NOT_UNLOADED, backend="b0"): (
        "resident; its engine has no unload: it stays until the engine evicts it"
    ),
    Placed(Fate.SHARED, Tier.MEMORY, names=("sql", "chef")): "kept for sql, chef",
    Placed(Fate.HELD, backend="b0"): "loading from the host store",
    Placed(Fate.RESIDENT, backend="b0"): "resident already",
    Placed(Fate.FETCHING, backend="b0"): "fetching, to be loaded",
    Placed(Fate.UNFIT, backend="b0", misfit=Draining()): "cannot serve it: it is draining",
    Placed(Fate.LEAVING, backend="b0"): "it is about to go, or gone",
}


@pytest.mark.parametrize("placed", WORDS, ids=str)
def test_each_fate_has_its_words(placed: Placed) -> None:
    """By the place's name."""
    place = {Tier.MEMORY: "host store", Tier.DISK: "disk", None: "b0"}[placed.tier]
    assert told_at([placed]) == [(place, WORDS[placed])]


def test_every_fate_is_told() -> None:
    """The table above leaves none out."""
    assert {placed.fate for placed in WORDS} == set(Fate)


def test_versions_at_one_place_are_told_together() -> None:
    """What became of two is said once where it is the same."""
    gone, shared = Placed(Fate.GONE, Tier.MEMORY), Placed(Fate.SHARED, Tier.MEMORY, names=("sql",))
    assert told_at([gone, gone, shared]) == [("host store", "dropped; kept for sql")]


@pytest.mark.parametrize(
    ("fates", "told"),
    [
        ([Fate.FETCHING, Fate.HELD], [("host store", "fetching")]),
        ([Fate.HELD], [("host store", "held already")]),
        ([Fate.RESIDENT], [("host store", "not fetched"), ("b0", "resident already")]),
        ([], [("host store", "not fetched: no backend can serve it")]),
    ],
)
def test_a_prefetch_into_the_store_is_told_in_one_line(fates: list[Fate], told: list[tuple[str, str]]) -> None:
    """Then what kept it away."""
    assert told_of_store(Placed(fate, backend="b0") for fate in fates) == told
