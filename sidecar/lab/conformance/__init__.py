"""What every policy must keep, as checks that the tests and `sidecar policies check` share.

Each check takes a maker of fresh policies, drives them through seeded random events and raises AssertionError with a
message for the policy's author. `check` runs all that concern a kind, the purity of its module among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sidecar.lab.conformance import eviction, ordering, prefetch, routing
from sidecar.lab.conformance.purity import is_pure
from sidecar.lab.conformance.seeds import Maker

CHECKS: dict[str, tuple[Callable[[Maker], None], ...]] = {
    "eviction": (
        eviction.victims_are_every_key_once,
        eviction.victims_changes_nothing,
        eviction.eviction_is_the_same_after_a_restore,
        eviction.keeps_a_small_golden_trace,
    ),
    "ordering": (
        ordering.decides_only_what_there_is_room_for,
        ordering.serves_everything_in_the_end,
        ordering.ordering_is_the_same_after_a_restore,
    ),
    "routing": (
        routing.picks_one_of_the_candidates,
        routing.breaks_ties_by_id,
        routing.picks_the_same_again,
        routing.follows_the_backends,
        routing.routing_is_the_same_after_a_restore,
        routing.remembers_within_bounds,
    ),
    "prefetch": (
        prefetch.advises_only_what_can_be_brought,
        prefetch.keeps_within_the_budget,
        prefetch.advice_changes_nothing,
        prefetch.prefetch_is_the_same_after_a_restore,
        prefetch.remembers_a_bounded_number,
    ),
}


def check(kind: str, policy: type[Any]) -> list[str]:
    """Run every check of a kind and return what was checked. Raises AssertionError at the first that fails."""
    done = []
    for one in CHECKS[kind]:
        one(policy)
        done.append(one.__name__.replace("_", " "))
    is_pure(policy)
    return [*done, "is pure"]
