"""One suite over every policy in the registry: a new one is picked up by its registry line."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from policies.eviction.lru import LRU
from policies.ordering.skip import Skip
from policies.prefetch.planned import Planned
from policies.prefetch.speculative import Speculative
from policies.registry import POLICIES
from policies.routing.resident_first import ResidentFirst
from policies.views import BASE, Choice, Close, Open, Send
from sidecar.config.plugins import known, resolve
from sidecar.errors import Misused
from sidecar.lab.conformance import CHECKS, check, eviction, is_pure, ordering, prefetch, routing
from sidecar.lab.conformance.seeds import Maker

CASES = [(kind, name, one) for kind, names in POLICIES.items() for name in names for one in CHECKS[kind]]
EVERY = [(kind, name) for kind, names in POLICIES.items() for name in names]


@pytest.mark.parametrize(("kind", "name", "one"), CASES, ids=[f"{kind}-{name}-{c.__name__}" for kind, name, c in CASES])
def test_keeps(kind: str, name: str, one: Callable[[Maker], None]) -> None:
    """Every policy of a kind keeps every check of that kind."""
    one(resolve(kind, name))


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_is_pure(kind: str, name: str) -> None:
    """Every policy's module is free of clocks, randomness and I/O."""
    is_pure(resolve(kind, name))


@pytest.mark.parametrize(("kind", "name"), [(kind, next(iter(names))) for kind, names in POLICIES.items()])
def test_check_lists_what_it_checked(kind: str, name: str) -> None:
    """What the command line prints: every check by name, purity last."""
    done = check(kind, resolve(kind, name))
    assert len(done) == len(CHECKS[kind]) + 1
    assert done[-1] == "is pure"


def test_every_kind_has_checks() -> None:
    """A kind in the registry without checks would pass unseen."""
    assert POLICIES.keys() == CHECKS.keys()


# The checks themselves must be able to fail.


class Forgetful(LRU):
    """Leaves out the last key."""

    def victims(self, now_ns: int) -> Iterator[str]:
        yield from list(super().victims(now_ns))[:-1]


class Restless(LRU):
    """Changes its order whenever it is asked."""

    def victims(self, now_ns: int) -> Iterator[str]:
        yield from list(self._keys)
        if self._keys:
            self._keys.move_to_end(next(iter(self._keys)))


class Amnesiac(LRU):
    """Restores nothing."""

    def restore(self, state: list[str]) -> None:
        pass


class Pushy(Skip):
    """Sends whatever is oldest, room or no room."""

    def choose(self, room: Any, now_ns: int) -> Any:
        return Send(min(self._version)) if self._version else None


class Closing(Skip):
    """Takes slots that are in use."""

    def choose(self, room: Any, now_ns: int) -> Any:
        return Close(next(iter(room.open))) if room.open else super().choose(room, now_ns)


class Stubborn(Skip):
    """Never opens anything."""

    def choose(self, room: Any, now_ns: int) -> Any:
        decision = super().choose(room, now_ns)
        return None if isinstance(decision, Open) else decision


class Dithering(Skip):
    """Opens and closes without end."""

    def choose(self, room: Any, now_ns: int) -> Any:
        idle = [version for version, slot in room.open.items() if not slot.running]
        return Close(idle[0]) if idle else super().choose(room, now_ns)


class Blank(Skip):
    """Restores to nothing."""

    def restore(self, state: Any) -> None:
        super().restore([])


class Elsewhere(ResidentFirst):
    """Picks a backend that nobody offered."""

    def pick(self, request: Any, candidates: Any, now_ns: int) -> Choice:
        return Choice("b99", "why not")


class FirstListed(ResidentFirst):
    """Lets the order of the list decide."""

    def pick(self, request: Any, candidates: Any, now_ns: int) -> Choice:
        return Choice(candidates.backends[0], "first")


class Rotating(ResidentFirst):
    """Counts, and does not write its count down."""

    def __init__(self) -> None:
        self.count = 0

    def pick(self, request: Any, candidates: Any, now_ns: int) -> Choice:
        self.count += 1
        ordered = sorted(candidates.backends)
        return Choice(ordered[self.count % len(ordered)], "its turn")


class Insistent(Planned):
    """Asks for what cannot be brought, too."""

    def advise(self, spare: Any, now_ns: int) -> Any:
        return [one.version for one in spare.coming()]


class Repeating(Planned):
    """Says everything twice."""

    def advise(self, spare: Any, now_ns: int) -> Any:
        return [*super().advise(spare, now_ns)] * 2


class Lavish(Speculative):
    """Knows no budget."""

    def advise(self, spare: Any, now_ns: int) -> Any:
        return [known[0] for known in self.snapshot() if spare.can_bring(known[0])]


class Impatient(Speculative):
    """Takes being asked for a sign of interest."""

    def advise(self, spare: Any, now_ns: int) -> Any:
        advice = super().advise(spare, now_ns)
        for version in advice[:1]:
            self.on_request(version, 1, now_ns)
        return advice


class Lossy(Speculative):
    """Restores to nothing."""

    def restore(self, state: Any) -> None:
        super().restore([])


class Hoarding(Planned):
    """Remembers every version there ever was."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def on_request(self, version: str, size_bytes: int, now_ns: int) -> None:
        self.seen[version] = size_bytes

    def snapshot(self) -> Any:
        return self.seen


@pytest.mark.parametrize(
    ("broken", "one", "says"),
    [
        (Forgetful, eviction.victims_are_every_key_once, "must yield what is tracked"),
        (Restless, eviction.victims_changes_nothing, "differs|changed"),
        (Amnesiac, eviction.eviction_is_the_same_after_a_restore, "disagree"),
        (Pushy, ordering.decides_only_what_there_is_room_for, "can_send says no"),
        (Closing, ordering.decides_only_what_there_is_room_for, "are running|still deciding"),
        (Stubborn, ordering.serves_everything_in_the_end, "never sent"),
        (Dithering, ordering.serves_everything_in_the_end, "still deciding|never sent"),
        (Blank, ordering.ordering_is_the_same_after_a_restore, "disagree"),
        (Elsewhere, routing.picks_one_of_the_candidates, "no candidate"),
        (FirstListed, routing.breaks_ties_by_id, "by the order"),
        (Rotating, routing.routing_is_the_same_after_a_restore, "another backend"),
        (Insistent, prefetch.advises_only_what_can_be_brought, "can_bring says no"),
        (Repeating, prefetch.advises_only_what_can_be_brought, "twice"),
        (Lavish, prefetch.keeps_within_the_budget, "the budget is"),
        (Impatient, prefetch.advice_changes_nothing, "differs|changed"),
        (Lossy, prefetch.prefetch_is_the_same_after_a_restore, "disagree"),
        (Hoarding, prefetch.remembers_a_bounded_number, "grew from"),
    ],
)
def test_a_broken_policy_is_found(broken: type[Any], one: Callable[[Maker], None], says: str) -> None:
    """Each check fails for a policy that breaks exactly its rule."""
    with pytest.raises(AssertionError, match=says):
        one(broken)


def test_an_impure_module_is_found() -> None:
    """This very module imports a clock and randomness, so a policy defined in it is impure."""
    assert time.monotonic_ns() >= 0
    assert random.Random(1).random() < 1
    with pytest.raises(AssertionError, match="imports random"):
        is_pure(Forgetful)


# Names.


def test_unknown_policy_names_those_that_exist() -> None:
    """A wrong name is told with the right ones and the way to a class of one's own."""
    with pytest.raises(Misused, match=r'no eviction policy is called "lrru"; there are gdsf, lfu, lru') as raised:
        resolve("eviction", "lrru")
    assert "package.module:Class" in raised.value.message


def test_a_class_may_be_named_by_its_module() -> None:
    """`package.module:Class` needs no registry line."""
    assert resolve("eviction", f"{__name__}:Forgetful") is Forgetful


@pytest.mark.parametrize("target", ["no.such.module:Class", f"{__name__}:NoSuchClass", f"{__name__}:BASE"])
def test_a_class_that_is_not_there_is_misuse(target: str) -> None:
    """A wrong module, a wrong class and what is no class are told by name."""
    assert BASE == ""
    with pytest.raises(Misused) as raised:
        resolve("eviction", target)
    assert target in raised.value.message


def test_known_names_are_the_registry_and_plug_ins() -> None:
    """Every registry line can be named."""
    for kind, names in POLICIES.items():
        assert names.items() <= known(kind).items()
