"""Each routing check fails for a policy that breaks exactly its rule."""

from __future__ import annotations

from typing import Any

import pytest

from policies.routing.resident_first import ResidentFirst
from policies.views import Candidates, Choice, Waiting
from sidecar.lab.conformance import routing


class Clinging(ResidentFirst):
    """Keeps a version where it first was."""

    def __init__(self) -> None:
        self.homes: dict[str, str] = {}

    def pick(self, request: Waiting, candidates: Candidates, now_ns: int) -> Choice:
        first = super().pick(request, candidates, now_ns).backend
        return Choice(self.homes.setdefault(request.version, first), "home")

    def snapshot(self) -> Any:
        return self.homes

    def restore(self, state: Any) -> None:
        self.homes = dict(state)


class Hoarding(ResidentFirst):
    """Remembers every version."""

    def __init__(self) -> None:
        self.seen: dict[str, None] = {}

    def pick(self, request: Waiting, candidates: Candidates, now_ns: int) -> Choice:
        self.seen[request.version] = None
        return super().pick(request, candidates, now_ns)

    def snapshot(self) -> Any:
        return list(self.seen)


class Shared(ResidentFirst):
    """Counts in the class, for all policies in the process."""

    count = 0

    def pick(self, request: Waiting, candidates: Candidates, now_ns: int) -> Choice:
        Shared.count += 1
        ordered = sorted(candidates.backends)
        return Choice(ordered[Shared.count % len(ordered)], "its turn")


class Halfway(Clinging):
    """Follows the backends, but restores only half."""

    def pick(self, request: Waiting, candidates: Candidates, now_ns: int) -> Choice:
        if self.homes.get(request.version) not in candidates.backends:
            self.homes[request.version] = ResidentFirst.pick(self, request, candidates, now_ns).backend
        return Choice(self.homes[request.version], "home")

    def restore(self, state: Any) -> None:
        self.homes = dict(list(state.items())[: len(state) // 2])


@pytest.mark.parametrize(
    ("broken", "one", "says"),
    [
        (Clinging, routing.picks_one_of_the_candidates, "is no candidate"),
        (Clinging, routing.follows_the_backends, "is no candidate"),
        (Hoarding, routing.remembers_within_bounds, "had grown"),
        (Shared, routing.picks_the_same_again, "of the same"),
        (Halfway, routing.routing_is_the_same_after_a_restore, "disagree"),
    ],
)
def test_a_broken_policy_is_found(broken: type[Any], one: Any, says: str) -> None:
    """The check says what is wrong."""
    with pytest.raises(AssertionError, match=says):
        one(broken)
