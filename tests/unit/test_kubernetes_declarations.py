"""What objects declare, who has a name, what there is to do about it, and the words for how it stands."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from sidecar.cli.versions import with_times
from sidecar.errors import Invalid, Reason, Refused
from sidecar.kubernetes.choosing import Desired, desired
from sidecar.kubernetes.deciding import Do, marked_gone, next_look, set_back, to_do, to_do_without
from sidecar.kubernetes.declarations import (
    GRACE_S,
    VERSION,
    Declaration,
    Said,
    Source,
    _Spec,
    of_config_map,
    of_lora,
)
from sidecar.kubernetes.pauses import Pauses
from sidecar.kubernetes.places import NOWHERE, Places
from sidecar.kubernetes.standings import Attempt, Phase, Standing, loser, standing_of, status_of
from sidecar.shell.managing import Wanted, in_words, taken_over
from sidecar.shell.metrics import DECLARED_PHASES
from sidecar.state import records
from sidecar.state.records import Record
from sidecar.state.written import from_json, to_json
from tests.kubernetes_cluster import CRDS
from tests.registries import adapter, record

NOW = 1_800_000_000.0
DIGEST = "ab" * 32
IDLE = Attempt()
SOURCE = Source("LoraAdapter", "ml", "sql", "uid-1", "2026-01-01T00:00:00Z", 1, "7")
DECLARED = Declaration(SOURCE, "sql", "s3://loras/sql", grace_s=60.0)


def lora(called: str = "sql", /, **spec: Any) -> dict[str, Any]:
    metadata = {"name": called, "namespace": "ml", "uid": called, "generation": 3}
    metadata["creationTimestamp"] = "2026-01-01T00:00:00Z"
    return {"metadata": metadata, "spec": {"source": "s3://loras/sql"} | spec}


def config_map(text: Any, name: str = "loras", created: str = "2026-01-02T00:00:00Z") -> dict[str, Any]:
    metadata = {"name": name, "namespace": "ml", "uid": name, "creationTimestamp": created}
    return {"metadata": metadata, "data": {"adapters.yaml": text}}


def registered(declaration: Declaration = DECLARED, seed: int = 1, **fields: Any) -> Record:
    """Return the record of a declaration that has been brought."""
    made = record(declaration.name, seed)
    declared = replace(declaration.declared, digest=made.adapter.digest)
    owner = declaration.source.owner
    return replace(records.as_declared(made, declared, owner, declaration.tenants, declaration.pinned), **fields)


# Reading.


def test_a_lora_says_all_that_it_may() -> None:
    """Its own name stands where the spec gives none; a number will do as rev."""
    (read,) = of_lora(
        lora(
            digest=f"sha256:{DIGEST}",
            tenants=["acme"],
            pinned=True,
            prefetch={"backends": ["trt-*"]},
            removal={"graceSeconds": 5},
            rev=7,
        )
    ).declarations
    assert read == Declaration(read.source, "sql", "s3://loras/sql", DIGEST, ("acme",), True, ("trt-*",), 5.0, "7")
    assert of_lora(lora("x", name="team/sql")).declarations[0].name == "team/sql"
    assert of_lora(lora(prefetch={})).declarations[0].prefetch == ()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"source": ""}, "source"),
        ({"source": 3}, "source"),
        ({"digest": "abc"}, "64 hexadecimal digits"),
        ({"sauce": 1}, "sauce"),
        ({"name": "../up"}, "adapter name"),
        ({"removal": {"graceSeconds": -1}}, "removal.graceSeconds"),
        ({"tenants": "acme"}, "tenants"),
    ],
)
def test_a_lora_that_is_wrong_keeps_its_name(spec: dict[str, Any], said: str) -> None:
    """What is wrong is named, and that the name is declared is known all the same: it is not taken out for a typo."""
    (read,) = of_lora(lora(**spec)).declarations
    assert said in read.problem
    assert read.name == spec.get("name", "sql")
    assert to_do(read, registered(), NOW) is Do.NOTHING


def test_a_map_lists_adapters() -> None:
    """Each entry is a declaration; a wrong one is that with a problem, others are as they are."""
    said = of_config_map(
        config_map("[{name: a, source: a, removalGraceSeconds: 0}, {name: b, source: b, x: 1}, {name: c, source: c}]")
    )
    assert [(each.name, bool(each.problem)) for each in said.declarations] == [("a", False), ("b", True), ("c", False)]
    assert said.declarations[0].grace_s == 0
    assert not said.problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- name: [", "not YAML"),
        ("{}", "must be a list"),
        ("- source: /a", "entry 1"),
        ("- name: 3\n  source: /a", "entry 1"),
        ("[{name: a, source: /a}, just words]", "entry 2"),
    ],
)
def test_a_map_that_cannot_be_read_whole_says_so(text: str, said: str) -> None:
    """It may declare more than what was understood."""
    assert said in of_config_map(config_map(text)).problem


def test_a_map_without_the_key_is_wrong_and_an_empty_list_is_not() -> None:
    """The one is a mistake, the other takes all of it out."""
    assert "adapters.yaml" in of_config_map({"metadata": {"name": "m", "namespace": "ml"}, "data": None}).problem
    for text in ("", "[]"):
        said = of_config_map(config_map(text))
        assert (said.declarations, said.problem) == ((), "")


# Choosing.


def test_the_older_object_has_the_name() -> None:
    """Whatever the order in which they are read; the other one is told of."""
    older, younger = of_lora(lora("a", name="sql")), of_config_map(config_map("[{name: sql, source: /x}]"))
    for both in ([older, younger], [younger, older]):
        chosen = desired(both)
        assert chosen.chosen["sql"].source.kind == "LoraAdapter"
        assert [(lost.source.kind, won.source.kind) for lost, won in chosen.losers] == [("ConfigMap", "LoraAdapter")]


def test_of_one_age_kind_and_name_decide() -> None:
    """Creation times are whole seconds; every process must choose alike."""
    one, two = of_lora(lora("a", name="sql")), of_lora(lora("b", name="sql"))
    assert desired([two, one]).chosen["sql"].source.name == "a"


def test_an_object_that_is_being_deleted_counts_no_more() -> None:
    """Another's finalizer may keep it for long."""
    leaving = lora()
    leaving["metadata"]["deletionTimestamp"] = "2026-01-03T00:00:00Z"
    assert not desired([of_lora(leaving)]).chosen


# Deciding.


def test_what_there_is_to_do() -> None:
    """Nothing when it is as declared; else the source is read only if that may bring something."""
    mine = registered()
    assert to_do(DECLARED, None, NOW) is Do.BRING
    assert to_do(DECLARED, mine, NOW) is Do.NOTHING
    for changed in (replace(DECLARED, origin="/b"), replace(DECLARED, rev="2"), replace(DECLARED, digest=DIGEST)):
        assert to_do(changed, mine, NOW) is Do.BRING
    for changed in (
        replace(DECLARED, tenants=("acme",)),
        replace(DECLARED, pinned=True),
        replace(DECLARED, grace_s=5.0),
        replace(DECLARED, prefetch=("b0",)),
        replace(DECLARED, source=replace(SOURCE, name="other")),
    ):
        assert to_do(changed, mine, NOW) is Do.SET
        assert to_do(changed, set_back(changed, mine), NOW) is Do.NOTHING


def test_a_name_of_somebody_elses_is_left_alone() -> None:
    """By hand, by the configuration, by another namespace; the annotation takes over what was done by hand only."""
    take_over = replace(DECLARED, take_over=True)
    by_hand = record("sql")
    assert to_do(DECLARED, by_hand, NOW) is Do.NOTHING
    assert to_do(take_over, by_hand, NOW) is Do.BRING
    for owner in ("config", "k8s:other/LoraAdapter/sql", "k8s:ml2/LoraAdapter/sql"):
        assert to_do(take_over, replace(by_hand, managed_by=owner), NOW) is Do.NOTHING


def test_an_override_stands_for_its_time() -> None:
    """Then the declared version is set back, without its source as long as the name has it."""
    other, _ = records.added(registered(), "sql", adapter(2), "/other", now=NOW)
    held = replace(other, held_until=NOW + 5)
    assert to_do(DECLARED, held, NOW) is Do.NOTHING
    assert to_do(replace(DECLARED, rev="2"), held, NOW) is Do.NOTHING
    assert next_look(held, NOW) == NOW + 5
    assert to_do(DECLARED, held, NOW + 5) is Do.SET
    back = set_back(DECLARED, held)
    assert (back.current, back.previous, back.held_until) == (1, 2, 0.0)
    forgotten = replace(held, versions=held.versions[1:], previous=None)
    assert to_do(DECLARED, forgotten, NOW + 5) is Do.BRING


def test_a_share_that_is_tried_out_ends_with_its_hold() -> None:
    """It is an override as well."""
    staged, _ = records.added(registered(), "sql", adapter(2), "/other", now=NOW, stage=True)
    assert to_do(DECLARED, records.promoted(staged, 2, 10), NOW) is Do.SET


def test_a_name_goes_when_its_grace_is_over() -> None:
    """Counted from when it was first seen to have gone, by whichever process."""
    mine, none = registered(), Desired()
    assert to_do_without(mine, none, NOW) is Do.MARK
    marked = marked_gone(mine, NOW)
    assert to_do_without(marked, none, NOW + 59) is Do.NOTHING
    assert next_look(marked, NOW) == NOW + 60
    assert to_do_without(marked, none, NOW + 60) is Do.FORGET
    assert to_do(DECLARED, marked, NOW + 59) is Do.SET
    at_once = registered(replace(DECLARED, grace_s=0.0))
    assert to_do_without(at_once, none, NOW) is Do.FORGET


def test_a_name_stays_while_it_is_held_or_its_object_cannot_be_read() -> None:
    """Whatever its grace."""
    gone = marked_gone(registered(), NOW - 1000)
    unread = Desired(unread={SOURCE.owner: Said(SOURCE, problem="not YAML")})
    assert to_do_without(gone, unread, NOW) is Do.NOTHING
    assert to_do_without(replace(gone, held_until=NOW + 1), Desired(), NOW) is Do.NOTHING
    assert to_do_without(gone, Desired(), NOW) is Do.FORGET


# Managing.


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


def test_owners_in_words() -> None:
    """Those of a cluster are said as a person would."""
    assert in_words("cli") == "cli"
    assert in_words("k8s:ml/ConfigMap/a") == "the ConfigMap a in Kubernetes' namespace ml"


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


def stands(rec: Record | None, attempt: Attempt = IDLE, places: Places = NOWHERE, **fields: Any) -> Standing:
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
        assert stands(ahead, places=Places(("a", "b"), ready), prefetch=("a", "b")).phase is phase


def test_a_status_keeps_the_time_of_what_has_not_turned() -> None:
    """So that one that says the same is the same, and is not written again."""
    first = status_of(stands(None), 1, {}, NOW)
    later = status_of(stands(registered()), 2, first, NOW + 60)
    times = {each["type"]: each["lastTransitionTime"] for each in later["conditions"]}
    assert times["Accepted"] == times["Held"] == "2027-01-15T08:00:00Z"
    assert times["Ready"] == "2027-01-15T08:01:00Z"
    assert status_of(stands(registered()), 2, later, NOW + 120) == later


def allowed(schema: dict[str, Any], found: Any, at: str = "status") -> None:
    """Check an object against a structural schema, as far as the product's CRD uses it."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int}
    assert isinstance(found, kinds[schema["type"]]), at
    assert found in schema.get("enum", [found]), at
    assert re.search(schema.get("pattern", ""), found if isinstance(found, str) else ""), at
    if schema["type"] == "array":
        for each in found:
            allowed(schema["items"], each, f"{at}[]")
    if schema["type"] == "object":
        assert not set(schema.get("required", ())) - set(found), at
        for key, value in found.items():
            assert key in schema["properties"], f"{at}.{key}"
            allowed(schema["properties"][key], value, f"{at}.{key}")


def crd() -> dict[str, Any]:
    """Return the schema of LoraAdapter's version."""
    (version,) = yaml.safe_load((CRDS / "loraadapters.yaml").read_text())["spec"]["versions"]
    assert version["name"] == VERSION
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]
    return schema


def test_the_definition_takes_every_status() -> None:
    """Each phase, with all that may be in it: else the API server drops it in silence, or refuses it."""
    schema = crd()["status"]
    places = Places(("a", "b"), ("a",), ("a",))
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
        allowed(schema, status)
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
