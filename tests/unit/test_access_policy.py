"""The ready sets of policies: who may do what, written out by hand, and the traps of prefixes and roles."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sidecar.access.policy import READY, Roles, prefix_owner
from sidecar.access.principal import SYSTEM, Action, Principal, Proof, Resource, Sort
from sidecar.access.resources import Resources, adapter_resource, version_resource
from sidecar.config.access import Policies
from sidecar.state.records import UNSEEN, added, promoted
from tests.kit.corekit import adapter_of

ROLES = {"acme": ("publisher",), "group:ops": ("operator",), "eve": ("viewer",)}

OWN = Resource(Sort.ADAPTER, "acme/sql")
SHARED = Resource(Sort.ADAPTER, "beta/sql", allow=("acme", "eve"))
OTHERS = Resource(Sort.ADAPTER, "beta/sql")
CLOSED = Resource(Sort.ADAPTER, "acme/sql", allow=("beta",))
BASE = Resource(Sort.BASE, "llama")
BACKEND = Resource(Sort.BACKEND, "gpu-0")

VIEW = {Action.LIST, Action.SHOW, Action.INFER_VERSION}
USE = VIEW | {Action.INFER}
CHANGE = {Action.REGISTER, Action.PROMOTE, Action.EVICT, Action.PAUSE}
SEE = {Action.LIST, Action.SHOW, Action.SEE_QUEUE}
EVERYTHING = set(Action)


def proven(tenant: str, *groups: str, roles: tuple[str, ...] = (), proof: Proof = Proof.KEY) -> Principal:
    return Principal(tenant, proof, groups=groups, roles=roles)


def may(ready: str, principal: Principal, resource: Resource, separator: str = "/") -> set[Action]:
    policy = READY[ready](Roles(ROLES), separator)
    return {action for action in Action if policy.decide(principal, action, resource).allowed}


EXPECTED = [  # set, tenant (acme publishes, eve views, zoe has no role), resource, what it may do
    ("open", "zoe", OWN, USE),
    ("open", "zoe", OTHERS, USE),
    ("open", "zoe", SHARED, set()),
    ("open", "eve", OTHERS, USE),
    ("open", "acme", OTHERS, USE | CHANGE),
    ("open", "acme", CLOSED, CHANGE),
    ("open", "acme", SHARED, USE | CHANGE),
    ("open", "zoe", BASE, USE),
    ("open", "acme", BACKEND, set()),
    ("open", "acme", SYSTEM, set()),
    ("open", "zoe", Resource(Sort.TENANT, "zoe"), SEE),
    ("open", "acme", Resource(Sort.TENANT, "acme"), SEE | {Action.CANCEL}),
    ("open", "acme", Resource(Sort.TENANT, "zoe"), set()),
    ("tenant_prefix", "acme", OWN, USE | CHANGE),
    ("tenant_prefix", "acme", SHARED, USE),
    ("tenant_prefix", "acme", OTHERS, set()),
    ("tenant_prefix", "acme", CLOSED, CHANGE),
    ("tenant_prefix", "eve", Resource(Sort.ADAPTER, "eve/x"), USE),
    ("tenant_prefix", "eve", SHARED, USE),
    ("tenant_prefix", "zoe", OWN, set()),
    ("tenant_prefix", "zoe", Resource(Sort.VERSION, "zoe/x", ordinal=2, is_current=False), USE),
    ("tenant_prefix", "zoe", BASE, USE),
    ("roles", "zoe", OWN, {Action.INFER}),
    ("roles", "zoe", SHARED, set()),
    ("roles", "eve", OWN, USE),
    ("roles", "eve", SHARED, USE),
    ("roles", "eve", CLOSED, set()),
    ("roles", "acme", OTHERS, USE | CHANGE),
    ("roles", "zoe", BASE, USE),
    ("roles", "zoe", Resource(Sort.TENANT, "zoe"), SEE),
]


@pytest.mark.parametrize(("ready", "tenant", "resource", "expected"), EXPECTED)
def test_each_may_do_what_its_role_says(ready: str, tenant: str, resource: Resource, expected: set[Action]) -> None:
    assert may(ready, proven(tenant), resource) == expected


@pytest.mark.parametrize("ready", READY)
@pytest.mark.parametrize("resource", [OWN, OTHERS, CLOSED, BASE, BACKEND, SYSTEM, Resource(Sort.TENANT, "acme")])
def test_an_operator_may_do_everything(ready: str, resource: Resource) -> None:
    by_group, by_credential = proven("zoe", "staff", "ops"), proven("", roles=("operator",), proof=Proof.LOCAL)
    assert may(ready, by_group, resource) == may(ready, by_credential, resource) == EVERYTHING


@pytest.mark.parametrize("ready", READY)
@pytest.mark.parametrize(
    "stranger",
    [
        proven("group:ops"),  # a tenant with the words of a group
        proven("zoe", "group:ops"),
        proven("ops"),
        proven("zoe", roles=("root", "Operator", "")),
        proven("acme ", "ops "),
        proven("acme", "ops", proof=Proof.CLAIMED),
        proven("acme", "ops", proof=Proof.NONE),
    ],
)
def test_roles_are_not_taken_from_words_alone(ready: str, stranger: Principal) -> None:
    new = Resource(Sort.ADAPTER, "acme/new")
    assert may(ready, stranger, new).isdisjoint(CHANGE)
    assert may(ready, stranger, SYSTEM) == set()


@pytest.mark.parametrize(
    ("tenant", "name"),
    [
        ("acme", "acme-evil/sql"),
        ("acme", "acme"),
        ("acme", "acmes/sql"),
        ("acme", "beta/acme/sql"),
        ("acme", "ACME/sql"),
        ("acme", "acme/"),  # no valid name; never asked by a registry, but by a client
        ("acme", ""),
        ("", "acme/sql"),
        ("", "sql"),
        ("", ""),
        ("", "/sql"),
        ("/", "/sql"),
        ("acme/lab", "acme/lab/sql"),  # a part of what acme owns
        ("acme/", "acme/sql"),
        ("acme/sql", "acme/sql"),
        ("*", "acme/sql"),
        ("acme\n", "acme/sql"),
        ("ácme", "acme/sql"),
        ("a%2Fb", "a/b"),
        ("spiffe://cluster.local/ns/acme", "acme/sql"),
    ],
)
def test_a_tenant_does_not_own_what_only_begins_like_it(tenant: str, name: str) -> None:
    assert may("tenant_prefix", proven(tenant, roles=("publisher",)), Resource(Sort.ADAPTER, name)) == set()


@pytest.mark.parametrize("separator", ["/", ".", "_", "-"])
def test_the_first_separator_ends_the_owner(separator: str) -> None:
    assert prefix_owner(separator.join(("acme", "lab", "sql")), separator) == "acme"
    assert prefix_owner(separator.join(("acme-evil".replace("-", "x"), "sql")), separator) == "acmexevil"
    assert prefix_owner("acme", separator) == ""


def test_with_a_dash_a_tenant_whose_name_has_one_owns_nothing() -> None:
    evil = proven("acme-evil", roles=("publisher",))
    assert may("tenant_prefix", evil, Resource(Sort.ADAPTER, "acme-evil-sql"), "-") == set()


def test_an_empty_tenant_owns_no_requests() -> None:
    assert may("open", proven("", roles=("publisher",)), Resource(Sort.TENANT, "")) == set()


def test_the_rule_reads_well() -> None:
    policy = READY["tenant_prefix"](Roles(ROLES), "/")
    assert policy.decide(proven("acme"), Action.PROMOTE, OWN).by == "tenant_prefix: acme/ belongs to acme"
    denial = policy.decide(proven("acme"), Action.INFER, CLOSED)
    assert denial.by == "adapters.allow: the allow list does not have the tenant"


def test_the_sets_are_those_of_the_configuration() -> None:
    assert set(READY) == set(Policies.model_json_schema()["properties"]["ready"]["enum"])


def test_a_record_becomes_a_resource() -> None:
    record, _ = added(None, "acme/sql", adapter_of("one"), "/a", now=0.0, labels=[("owner", "ann"), ("team", "ml")])
    record, _ = added(record, "acme/sql", adapter_of("two"), "/b", now=1.0, labels=[("team", "web")])
    record = promoted(record, 2)
    assert adapter_resource(record) == Resource(
        Sort.ADAPTER, "acme/sql", labels=(("team", "web"),), base_model=record.adapter.base_model
    )
    old = version_resource(record, 1)
    assert (old.sort, old.owner, old.ordinal, old.is_current) == (Sort.VERSION, "ann", 1, False)
    assert version_resource(record, 2).is_current


def test_a_name_that_is_not_published_yet_is_for_nobody() -> None:
    record, _ = added(None, "sql", adapter_of("one"), "/a", now=0.0)
    unseen = adapter_resource(replace(record, allow=UNSEEN))
    assert may("open", proven(UNSEEN[0]), unseen) == set()


def test_a_record_that_stays_keeps_its_resource() -> None:
    made = Resources()
    stays, changes, goes = (added(None, name, adapter_of("one"), "/a", now=0.0)[0] for name in ("a", "b", "c"))
    first = made.of([stays, changes, goes])
    changed, _ = added(changes, "b", adapter_of("two"), "/b", now=1.0, labels=[("team", "ml")])
    second = made.of([changed, stays])
    assert second == [adapter_resource(changed), adapter_resource(stays)]
    assert second[1] is first[0]
    assert made.of([goes, stays])[1] is first[0]
