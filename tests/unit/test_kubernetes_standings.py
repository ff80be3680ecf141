"""Who has the say over a name, and the words for how one that is declared stands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from sidecar.cli import with_times
from sidecar.errors import Invalid, Reason, Refused
from sidecar.kubernetes.deciding import marked_gone
from sidecar.kubernetes.declarations import (
    GRACE_S,
    VERSION,
    _Spec,
)
from sidecar.kubernetes.pauses import Pauses
from sidecar.kubernetes.placement import NOWHERE, Placement
from sidecar.kubernetes.standings import Attempt, Phase, Standing, loser, standing_of, status_of
from sidecar.shell.managing import Wanted, owner_phrase, taken_over
from sidecar.shell.metrics import DECLARED_PHASES
from sidecar.state.records import Record
from sidecar.state.written import from_json, to_json
from tests.kit.kubernetes_declared import DECLARED, IDLE, NOW, SOURCE, registered
from tests.kit.kubernetes_rules import CRD, check, shaped
from tests.kit.registries import record

LORAS = ("lora-sidecar.io", "ml", "loraadapters")


def test_who_has_the_say() -> None:
    """An owner over its own; an operator with a hold; a declaration over another of its namespace unless held."""
    mine = registered()
    assert taken_over(mine, Wanted(managed_by=SOURCE.owner), NOW) == mine
    assert taken_over(mine, Wanted(hold_s=5), NOW).held_until == NOW + 5
    with pytest.raises(Invalid, match="--hold") as caught:
        taken_over(mine, Wanted(), NOW)
    assert "LoraAdapter sql in Kubernetes' namespace ml" in caught.value.message
    other = "k8s:ml/ConfigMap/loras"
    assert taken_over(mine, Wanted(managed_by=other), NOW).managed_by == other
    held = replace(mine, held_until=NOW + 5)
    for owner in (SOURCE.owner, other):
        with pytest.raises(Invalid) as caught:
            taken_over(held, Wanted(managed_by=owner), NOW)
        assert caught.value.reason is Reason.MANAGED_ELSEWHERE


def test_owners_as_phrases() -> None:
    """Those of a cluster are said as a person would."""
    assert owner_phrase("cli") == "cli"
    assert owner_phrase("k8s:ml/ConfigMap/a") == "the ConfigMap a in Kubernetes' namespace ml"


def test_what_is_declared_is_written_down() -> None:
    """It comes back as it was; names without a declaration are written as they always were."""
    mine = marked_gone(registered(replace(DECLARED, prefetch=("a", "b"))), NOW)
    assert from_json("sql", to_json(mine)) == mine
    assert "declared" not in to_json(record("sql"))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("rollback sql --hold", "rollback sql --hold=1h"),
        ("rollback sql --hold --json", "rollback sql --hold=1h --json"),
        ("rollback sql --hold 2h", "rollback sql --hold 2h"),
        ("rollback sql --hold=5m", "rollback sql --hold=5m"),
        ("queue", "queue"),
        ("", ""),
    ],
)
def test_a_hold_without_a_time_is_an_hour(typed: str, meant: str) -> None:
    """Where nothing follows that could be one."""
    assert with_times(typed.split()) == meant.split()


# Standing.


def stands(rec: Record | None, attempt: Attempt = IDLE, places: Placement = NOWHERE, **fields: Any) -> Standing:
    return standing_of(replace(DECLARED, **fields), rec, attempt, places, NOW)


def test_how_a_declaration_stands() -> None:
    """From the first look to what is served, and what may go wrong on the way."""
    error = Refused(Reason.ADAPTER_UNAVAILABLE, "sql: the bucket is away")
    mine = registered()
    assert stands(None).phase is Phase.PENDING
    assert stands(None, Attempt(running=True)).phase is Phase.LOADING
    failed = stands(None, Attempt(running=True, error=error))
    assert (failed.phase, failed.reason) == (Phase.FAILED, "AdapterUnavailable")
    assert stands(mine).phase is Phase.READY
    assert stands(mine, rev="2").phase is Phase.LOADING
    still = stands(mine, Attempt(error=error), rev="2")
    assert still.phase is Phase.FAILED
    assert "still answers with v1" in still.message
    assert stands(replace(mine, held_until=NOW + 9)).phase is Phase.HELD
    assert stands(None, problem="wrong").reason == "InvalidDeclaration"


def test_what_is_loaded_ahead_is_ready_when_it_is_there() -> None:
    """On all backends that it is wanted on, and that are there."""
    ahead = registered(replace(DECLARED, prefetch=("a", "b")))
    for ready, phase in (((), Phase.LOADING), (("a",), Phase.LOADING), (("a", "b"), Phase.READY)):
        assert stands(ahead, places=Placement(("a", "b"), ready), prefetch=("a", "b")).phase is phase


def test_a_status_keeps_the_time_of_what_has_not_turned() -> None:
    """So that one that says the same is the same, and is not written again."""
    first = status_of(stands(None), 1, {}, NOW)
    later = status_of(stands(registered()), 2, first, NOW + 60)
    times = {each["type"]: each["lastTransitionTime"] for each in later["conditions"]}
    assert times["Accepted"] == times["Held"] == "2027-01-15T08:00:00Z"
    assert times["Ready"] == "2027-01-15T08:01:00Z"
    assert status_of(stands(registered()), 2, later, NOW + 120) == later


def crd() -> dict[str, Any]:
    """Return the schema of LoraAdapter's version."""
    (version,) = yaml.safe_load(CRD.read_text())["spec"]["versions"]
    assert version["name"] == VERSION
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]
    return schema


def test_the_definition_takes_every_status() -> None:
    """Each phase, with all that may be in it: else the API server drops it in silence, or refuses it."""
    schema = crd()["status"]
    places = Placement(("a", "b"), ("a",), ("a",))
    taken = replace(registered(), managed_by="config")
    standings = [
        stands(None),
        stands(None, Attempt(running=True)),
        stands(None, problem="wrong"),
        stands(None, Attempt(error=Refused(Reason.ADAPTER_UNAVAILABLE, "away"))),
        stands(taken),
        stands(registered(), places=places),
        stands(replace(registered(), held_until=NOW + 9), places=places),
        loser(DECLARED, DECLARED),
    ]
    assert {standing.phase for standing in standings} == set(Phase) - {Phase.REMOVING}
    for standing in standings:
        status = status_of(standing, 1, {}, NOW)
        found = {"metadata": {"name": "sql"}, "spec": {"source": "/l"}, "status": status}
        check(LORAS, found)
        assert shaped(LORAS, found) == found
        assert set(status) == set(schema["properties"])


def test_the_definition_has_the_keys_that_are_read() -> None:
    """No more and no fewer: what one side does not know is lost."""
    spec = crd()["spec"]["properties"]
    assert set(spec) == {field.alias for field in _Spec.model_fields.values()}
    assert set(spec["prefetch"]["properties"]) == {"backends"}
    assert spec["removal"]["properties"]["graceSeconds"]["default"] == GRACE_S
    assert {phase.value for phase in Phase} == set(crd()["status"]["properties"]["phase"]["enum"])
    assert tuple(DECLARED_PHASES) == tuple(phase.value for phase in Phase)


def test_pauses_grow_and_end() -> None:
    """Doubling up to the limit, by chance a little shorter, and no shorter than asked for."""
    pauses = Pauses(1.0, 8.0, lambda: 1.0)
    assert [pauses.next_s() for _ in range(5)] == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert pauses.next_s(asked_s=30.0) == 30.0
    pauses.end()
    assert pauses.next_s() == 1.0
    assert Pauses(1.0, 8.0, lambda: 0.0).next_s() == 0.8
