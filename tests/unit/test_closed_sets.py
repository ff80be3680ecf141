"""Events, effects, reasons and phases are closed sets: each member is handled, simulated, journaled and has words.

To add a member, add it where this fails. Where one function handles a whole union by `match`, mypy fails too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args

import grpc
import pytest

from policies.views import Decision, Hold
from sidecar import errors
from sidecar.cli import findings
from sidecar.core import causes, core, dispatching, effects, eligibility, enums, events, healing
from sidecar.errors import Family, Reason
from sidecar.fronts.openai import errors as openai_errors
from sidecar.kubernetes import standings
from sidecar.lab.plan import record as plan_record
from sidecar.lab.sim import records
from sidecar.lab.sim.product import Product
from sidecar.ownership import effects as ownership_effects
from sidecar.ownership import enums as ownership_enums
from sidecar.ownership import events as ownership_events
from sidecar.ownership import ownership, slots
from sidecar.replicas import keeper
from sidecar.shell import gateway, metrics
from sidecar.telling import endings, waits
from tests.kit.closed_sets import cases_of, classes_in, differences, made_in, members_of, named_in
from tests.kit.corekit import World
from tests.unit.test_explain import SCENES
from tests.worlds.ownership import process

ROOT = Path(__file__).parents[2]


class Closed(NamedTuple):
    """A closed set, what has to have all of its members, and what that is called in the sentence of a failure."""

    members: Any
    handled: Sequence[Any] | set[Any]
    what: str


NOT_IN_WORLDS = ("ShutdownBegun", "DiskHolds")
"""The first and the last that a process tells its core: what comes between is random."""
OF_A_BACKEND = [cls for cls in get_args(events.Event) if "backend" in {each.name for each in fields(cls)}]
CORE = [
    Closed(events.Event, classes_in(events), "the events of core/events.py"),
    Closed(events.Event, [events.BackendAdded, *core.HANDLERS], "HANDLERS of core/core.py"),
    Closed(OF_A_BACKEND, [events.BackendAdded, *core.OF_A_BACKEND], "OF_A_BACKEND of core/core.py"),
    Closed(causes.Cause, endings._PHRASES, "_PHRASES of telling/endings.py"),
    Closed(effects.Effect, classes_in(effects), "the effects of core/effects.py"),
    Closed(effects.Effect, [effects.WakeAt, *gateway._EFFECTS], "_EFFECTS of shell/gateway.py"),
    Closed(effects.Effect, cases_of(Product.carry_out), "the cases of lab/sim/product.py"),
    Closed(effects.Effect, cases_of(World._act), "the cases of tests/kit/corekit.py"),
    Closed(Decision, cases_of(dispatching.pump), "the decisions in core/dispatching.py"),
    Closed(Hold, eligibility._HOLDS, "_HOLDS of core/eligibility.py"),
    Closed(eligibility.Why, waits._PHRASES, "_PHRASES of telling/waits.py"),
    Closed(
        eligibility.Why,
        [*SCENES, eligibility.Why.NEXT, eligibility.Why.TENANT_CAP],
        "SCENES of tests/unit/test_explain.py",
    ),
    Closed(enums.Fault, healing._TOKENLESS, "_TOKENLESS of core/healing.py"),
    Closed(enums.Fault, healing._LOADS, "_LOADS of core/healing.py"),
    Closed(enums.Outcome, records._COUNTED, "_COUNTED of lab/sim/records.py"),
]
OWNERSHIP = [
    Closed(ownership_events.Event, classes_in(ownership_events), "the events of ownership/events.py"),
    Closed(ownership_events.Event, ownership.HANDLERS, "HANDLERS of ownership/ownership.py"),
    Closed(ownership_effects.Effect, classes_in(ownership_effects), "the effects of ownership/effects.py"),
    Closed(ownership_effects.Effect, keeper._EFFECTS, "_EFFECTS of replicas/keeper.py"),
    Closed(ownership_effects.Effect, process.EFFECTS, "EFFECTS of tests/worlds/ownership/process.py"),
    Closed(ownership_enums.Purpose, ownership.ANSWERS, "ANSWERS of ownership/ownership.py"),
    Closed(slots.State, slots.MAY_FOLLOW, "MAY_FOLLOW of ownership/slots.py"),
]
DROPPED = [reason for reason, row in errors.TABLE.items() if row.family is Family.DROPPED]
ERRORS = [
    Closed(Reason, errors.TABLE, "TABLE of errors.py"),
    Closed(Family, errors._CLASSES, "_CLASSES of errors.py"),
    Closed(Family, cases_of(enums.outcome_of), "the families in core/enums.py"),
    Closed(DROPPED, enums.DROPPED, "DROPPED of core/enums.py"),
    Closed({row.code for row in errors.TABLE.values()}, openai_errors.STATUSES, "STATUSES of fronts/openai/errors.py"),
]
WORDS = [
    Closed([phase.value for phase in standings.Phase], metrics.DECLARED_PHASES, "DECLARED_PHASES of shell/metrics.py"),
    Closed(findings.State, findings.MARKS, "MARKS of cli/findings.py"),
    Closed(findings.State, findings.STYLES, "STYLES of cli/findings.py"),
    Closed(plan_record.Binding, plan_record.HELPS, "HELPS of lab/plan/record.py"),
]
ALL = [*CORE, *OWNERSHIP, *ERRORS, *WORDS]


def name_of(closed: Closed) -> str:
    return closed.what.replace(" ", "-")


@pytest.mark.parametrize("closed", ALL, ids=name_of)
def test_every_member_is_handled(closed: Closed) -> None:
    assert differences(closed.members, closed.handled, closed.what) == []


# The comparison itself: a set with one more, and one with one less.


class Renewed:
    """A member that nobody knows."""


def with_one_more(closed: Any) -> Any:
    """Return a copy of a set that has a member more."""
    if isinstance(closed, type) and issubclass(closed, Enum):
        return Enum(closed.__name__, [*closed.__members__, "Renewed"])
    return Union[(*get_args(closed), Renewed)] if get_args(closed) else [*closed, "Renewed"]


@pytest.mark.parametrize("closed", ALL, ids=name_of)
def test_a_new_member_without_its_handler_is_found(closed: Closed) -> None:
    mutant = with_one_more(closed.members)
    assert len(members_of(mutant)) == len(members_of(closed.members)) + 1
    assert differences(mutant, closed.handled, closed.what) == [f"Renewed is not among {closed.what}: add it"]


@pytest.mark.parametrize("closed", ALL, ids=name_of)
def test_a_handler_of_nothing_is_found(closed: Closed) -> None:
    *others, last = members_of(closed.members)
    assert differences(others, closed.handled, closed.what) == [
        f"{closed.what} name {last}, which is no member any more"
    ]


def test_the_simulator_refuses_an_effect_that_it_does_not_know() -> None:
    with pytest.raises(AssertionError, match="Renewed"):
        Product.carry_out(None, Renewed())  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="Renewed"):
        World()._act(Renewed())  # type: ignore[arg-type]


# What is told, not handled.


def not_told(closed: Any, *folders: str) -> list[str]:
    """Return the members of a union of events that nothing in some folders makes."""
    made = made_in(*(ROOT / folder for folder in folders))
    return [name for name in members_of(closed) if name not in made]


def test_random_worlds_tell_every_event() -> None:
    """A new event occurs in a world, so that random ones check what must always hold of it."""
    worlds = ("sidecar/lab/sim", "tests/worlds", "tests/properties", "tests/kit")
    assert sorted(not_told(events.Event, *worlds)) == sorted(NOT_IN_WORLDS)
    assert not_told(ownership_events.Event, "tests/worlds/ownership") == []
    assert not_told(with_one_more(ownership_events.Event), "tests/worlds/ownership") == ["Renewed"]


def test_what_observers_and_stories_pick_out_is_there() -> None:
    """They need not know all, and what they know is a member."""
    assert metrics._EVENTS.keys() <= set(get_args(events.Event))
    assert metrics._EFFECTS.keys() <= set(get_args(effects.Effect))


@pytest.mark.parametrize(
    ("closed", "folder"),
    [
        (eligibility.Why, "sidecar/core"), (enums.Voided, "sidecar/core"), (enums.Cache, "sidecar/core"),
        (enums.Phase, "sidecar/core"), (enums.Fault, "sidecar/backends"),
        (ownership_enums.Why, "sidecar/ownership"), (Hold, "policies"),
        (Reason, "sidecar"),
    ],
)  # fmt: skip
def test_each_member_is_said_by_somebody(closed: type[Enum], folder: str) -> None:
    """Its tables aside."""
    known = {"NOT_OWNED"} if closed is enums.Fault else set()  # the shell's own: no engine can say it
    assert set(members_of(closed)) - named_in(closed, ROOT / folder) == known


# Words and codes.


def test_reasons_are_their_own_names_and_their_codes_are_grpcs() -> None:
    """Clients and other replicas read them, so no two are spelled the same."""
    assert [reason.value for reason in Reason] == [reason.name for reason in Reason]
    assert {row.code for row in errors.TABLE.values()} <= {code.name for code in grpc.StatusCode}
    for cls in errors._CLASSES.values():
        assert errors._CLASSES[cls.family] is cls


def test_an_ending_has_an_outcome_by_its_family() -> None:
    assert {enums.outcome_of(reason).value for reason in Reason if reason not in DROPPED} == {"refused", "failed"}
    assert all(enums.outcome_of(reason).name == reason.name for reason in DROPPED)


def test_only_what_never_ran_can_be_sent_again() -> None:
    assert {reason.row.family for reason in Reason if reason.row.retryable} == {Family.REFUSED}


def test_every_reason_to_wait_has_words() -> None:
    """A label of its own, and a clause that names nothing but places."""
    labels = [why.value for why in eligibility.Why]
    assert len({*labels}) == len(labels) == len({waits.because(why, "b0", "sql") for why in eligibility.Why})
    assert all("{" not in waits.because(why, "b0", "sql") for why in eligibility.Why)


def test_what_members_ask_each_other_keeps_its_names() -> None:
    """They are sent by name, and members of two releases live side by side during an update."""
    assert [purpose.name for purpose in ownership_enums.Purpose] == ["GO_ON", "TAKE_OVER", "MOVE"]


LABELS = {
    "outcome": {outcome.value for outcome in enums.Outcome},
    "cache": {cache.value for cache in enums.Cache},
    "why": {why.value for why in eligibility.Why},
    "phase": {phase.value for phase in standings.Phase},
    "reason": {f"{load}{fault.value}" for fault in enums.Fault for load in ("", "load_")}
    | {why.value for why in enums.Voided},
}
"""The values of labels whose values are a closed set."""


def test_what_pages_and_the_chart_say_of_labels_is_so() -> None:
    """Each value of such a label that an alert, a panel or a page asks for is one that can be."""
    pages = [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(each for each in (ROOT / "deploy").rglob("*") if each.is_file() and each.suffix != ".pyc"),
    ]
    text = "\n".join(page.read_text() for page in pages)
    asked = re.findall(rf'\b({"|".join(LABELS)})=~?\\?"([^"\\]+)', text)
    assert len(asked) > 8
    assert [
        (label, value) for label, values in asked for value in values.split("|") if value not in LABELS[label]
    ] == []
