"""What objects declare, who has a name, what there is to do about it, and the words for how it stands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sidecar.kubernetes.choosing import Desired, desired
from sidecar.kubernetes.deciding import Do, marked_gone, next_look, set_back, to_do, to_do_without
from sidecar.kubernetes.declarations import (
    Declaration,
    DeclaringObject,
    of_config_map,
    of_lora,
)
from sidecar.state import records
from tests.kit.kubernetes_declared import DECLARED, DIGEST, NOW, SOURCE, registered
from tests.kit.registries import adapter, record


def lora(called: str = "sql", /, **spec: Any) -> dict[str, Any]:
    metadata = {"name": called, "namespace": "ml", "uid": called, "generation": 3}
    metadata["creationTimestamp"] = "2026-01-01T00:00:00Z"
    return {"metadata": metadata, "spec": {"source": "s3://loras/sql"} | spec}


def config_map(text: Any, name: str = "loras", created: str = "2026-01-02T00:00:00Z") -> dict[str, Any]:
    metadata = {"name": name, "namespace": "ml", "uid": name, "creationTimestamp": created}
    return {"metadata": metadata, "data": {"adapters.yaml": text}}


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
        ({"tenants": ["two\nlines"]}, "the tenant has U+000A"),
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
    unread = Desired(unread={SOURCE.owner: DeclaringObject(SOURCE, problem="not YAML")})
    assert to_do_without(gone, unread, NOW) is Do.NOTHING
    assert to_do_without(replace(gone, held_until=NOW + 1), Desired(), NOW) is Do.NOTHING
    assert to_do_without(gone, Desired(), NOW) is Do.FORGET
