"""What operators read of an adapter's weights, place by place: after evict, unregister and prefetch."""

from __future__ import annotations

from collections.abc import Iterable

from sidecar.core.enums import Fate, Tier
from sidecar.core.misfits import Placed
from sidecar.telling.misfits import sentence

TIERS = {Tier.MEMORY: "host store", Tier.DISK: "disk"}
GOES = {Tier.MEMORY: "dropped", Tier.DISK: "deleted", None: "unloaded"}
"""What happens to weights that go; None is a backend."""


def told_at(places: Iterable[Placed]) -> list[tuple[str, str]]:
    """Return pairs of (tier or backend, what became of the adapter there), one a place."""
    told: dict[str, dict[str, None]] = {}
    for placed in places:
        told.setdefault(_place(placed), {})[_words(placed)] = None
    return [(place, "; ".join(words)) for place, words in told.items()]


def told_of_store(places: Iterable[Placed]) -> list[tuple[str, str]]:
    """Return the pairs for a prefetch that named no backend: one for the host store, then what kept it away."""
    places = list(places)
    fates = {placed.fate for placed in places}
    others = [placed for placed in places if placed.fate not in (Fate.FETCHING, Fate.HELD)]
    if Fate.FETCHING in fates:
        of_store = "fetching"
    elif Fate.HELD in fates:
        of_store = "held already"
    else:
        of_store = "not fetched" if others else "not fetched: no backend can serve it"
    return [(TIERS[Tier.MEMORY], of_store), *told_at(others)]


def _place(placed: Placed) -> str:
    return placed.backend if placed.tier is None else TIERS[placed.tier]


def _words(placed: Placed) -> str:
    goes = GOES[placed.tier]
    words = {
        Fate.ABSENT: "not resident" if placed.tier is None else "not held",
        Fate.GONE: goes,
        Fate.IN_USE: f"in use: {goes} as soon as its users are done",
        Fate.NOT_UNLOADED: "resident; its engine has no unload: it stays until the engine evicts it",
        Fate.SHARED: f"kept for {', '.join(placed.names)}",
        Fate.HELD: "loading from the host store",
        Fate.RESIDENT: "resident already",
        Fate.FETCHING: "fetching, to be loaded",
        Fate.UNFIT: f"cannot serve it: {sentence(placed.misfit) if placed.misfit else ''}",
        Fate.LEAVING: "it is about to go, or gone",
    }[placed.fate]
    if placed.is_pinned:
        words += "; it is pinned, so its next use brings it back to stay"
    if placed.lingers:
        words += "; vLLM keeps its weights in memory until it evicts them (vllm#54839)"
    return words
