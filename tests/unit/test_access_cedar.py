"""Cedar policies: the ready sets written in Cedar decide as ours do, names stay data, and faulty texts are refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("cedarpy", reason="needs the extra cedar")

import cedarpy
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar.access.cedar_text import DEPTH_MAX, OPERATORS_MAX, Faulty, statements_of
from sidecar.access.deciding import CachedPolicy
from sidecar.access.policy import CHANGE, READY, USE, Roles
from sidecar.access.policy_file import APPLIES, SCHEMA, TYPES, CedarPolicy
from sidecar.access.principal import SYSTEM, Action, Decision, Principal, Proof, Resource, Sort

EXAMPLES = Path(__file__).parents[2] / "examples" / "access"
ANN = Principal("ann", Proof.KEY)
SQL = Resource(Sort.ADAPTER, "acme/lab/sql", labels=(("team", "ml"), ("owner", "ann")), owner="ann", base_model="llama")


def cedar(text: str, roles: Roles | None = None, separator: str = "/") -> CedarPolicy:
    return CedarPolicy(statements_of(text, SCHEMA), roles or Roles({}), separator)


def decide(text: str, principal: Principal = ANN, action: Action = Action.INFER, resource: Resource = SQL) -> Decision:
    return cedar(text).decide(principal, action, resource)


WORDS = (
    "acme",
    "beta",
    "acme/lab",
    "",
    "ann",
    "group:ops",
    "*",
    'a"b',
    "ünï",
    "e\u0301",
    "\x00",
    "a\nb",
    "\\",
    "Tenant",
)
ROLES = {"acme": ("publisher",), "beta": ("viewer",), "group:ops": ("operator",), "group:": ("publisher",)}


def principal_of(rng: random.Random) -> Principal:
    return Principal(
        rng.choice(WORDS),
        rng.choice(list(Proof)),
        groups=tuple(rng.sample(["ops", "staff", "", "acme", "operator"], rng.choice([0, 0, 1, 2]))),
        roles=tuple(rng.sample(["operator", "publisher", "viewer", "root"], rng.choice([0, 0, 0, 1, 2]))),
    )


def resource_of(rng: random.Random, sort: Sort, separator: str) -> Resource:
    if sort not in (Sort.ADAPTER, Sort.VERSION):
        return Resource(sort, "" if sort is Sort.SYSTEM else rng.choice(WORDS))
    name = separator.join(rng.choice(WORDS) for _ in range(rng.choice([1, 2, 2, 2, 3])))
    allow = rng.choice([None, None, (), tuple(rng.sample(WORDS, 2))])
    labels = tuple((key, rng.choice(WORDS)) for key in rng.sample(WORDS, rng.choice([0, 2])))
    ordinal = rng.randrange(1, 1000) if sort is Sort.VERSION else None
    return Resource(
        sort, name, labels, rng.choice(WORDS), allow, ordinal, rng.random() < 0.5, base_model=rng.choice(WORDS)
    )


@pytest.mark.parametrize("ready", READY)
@pytest.mark.parametrize("separator", ["/", "-"])
def test_the_ready_sets_decide_alike_in_cedar(ready: str, separator: str) -> None:
    rng = random.Random(f"{ready} {separator}")
    ours = READY[ready](Roles(ROLES), separator)
    theirs = cedar((EXAMPLES / f"{ready}.cedar").read_text(), Roles(ROLES), separator)
    allowed = 0
    for _ in range(1500):
        action = rng.choice(list(Action))
        principal, resource = principal_of(rng), resource_of(rng, rng.choice(APPLIES[action]), separator)
        expected = ours.decide(principal, action, resource)
        found = theirs.decide(principal, action, resource)
        assert expected.allowed == found.allowed, (principal, action, resource, expected.by, found.by)
        allowed += found.allowed
    assert 300 < allowed < 1200, "neither is decided by chance"


async def test_what_cedar_denies_is_not_visible() -> None:
    rng = random.Random(7)
    policy = cedar((EXAMPLES / "tenant_prefix.cedar").read_text(), Roles(ROLES))
    cached = CachedPolicy(policy)
    for change in range(100):
        resources = {each.name: each for each in (resource_of(rng, Sort.ADAPTER, "/") for _ in range(20))}
        principal = principal_of(rng)
        seen = await cached.visible(principal, list(resources.values()), change)
        allowed = {name for name, each in resources.items() if policy.decide(principal, Action.LIST, each).allowed}
        assert seen == allowed


def test_the_schema_has_each_action_and_each_kind_of_resource() -> None:
    assert set(APPLIES) == set(Action)
    assert set(TYPES) == set(Sort) == {sort for sorts in APPLIES.values() for sort in sorts}
    assert all(f"action {action.value} in use " in SCHEMA for action in USE)
    assert all(f"action {action.value} in change " in SCHEMA for action in CHANGE)


@pytest.mark.parametrize("sort", Sort)
def test_what_is_said_of_a_resource_fits_the_schema(sort: Sort) -> None:
    """Cedar's own check of entities, which is left out where each decision would pay for it."""
    resource = Resource(sort, "a/b/c", (("k", "v"),), "ann", ("x", "y"), 3, base_model="llama")
    uid = {"type": TYPES[sort], "id": "a/b/c"}
    entity = cedar("permit(principal, action, resource);")._entity(uid, resource)
    assert len(cedarpy.Entities.from_json_str(cedarpy.json.dumps([entity]), SCHEMA)) >= 1


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ('resource in Folder::"acme"', True),
        ('resource in Folder::"acme/lab"', True),
        ('resource in Folder::"acme/lab/sql"', False),
        ('resource in Folder::"lab"', False),
        ('resource in Base::"llama"', True),
        ('resource in Adapter::"acme/lab/sql"', True),
        ('resource is Adapter && resource.hasTag("team") && resource.getTag("team") == "ml"', True),
        ("resource has owner && resource.owner == principal.name", True),
        ('resource has prefix && resource.prefix == Tenant::"acme"', True),
        ('resource is Adapter && resource.name like "acme/*"', True),
        ("resource has allow", False),
    ],
)
def test_policies_can_speak_of(condition: str, expected: bool) -> None:
    assert decide(f"permit(principal, action, resource) when {{ {condition} }};").allowed is expected


def test_a_version_is_in_all_that_its_adapter_is_in() -> None:
    old = Resource(Sort.VERSION, "acme/sql", ordinal=3, is_current=False, base_model="llama")
    text = """permit(principal, action == Action::"infer_version", resource is Version)
        when { resource in Adapter::"acme/sql" && resource in Folder::"acme" && resource in Base::"llama"
               && resource.ordinal == 3 && !resource.current };"""
    assert decide(text, action=Action.INFER_VERSION, resource=old).allowed


def test_groups_and_roles_are_parents_of_the_tenant() -> None:
    text = (
        'permit(principal in Group::"staff", action, resource); permit(principal in Role::"viewer", action, resource);'
    )
    policy = cedar(text, Roles({"eve": ("viewer",)}))
    assert policy.decide(Principal("zoe", Proof.KEY, groups=("staff",)), Action.LIST, SQL).allowed
    assert policy.decide(Principal("eve", Proof.KEY), Action.LIST, SQL).allowed
    assert not policy.decide(Principal("eve", Proof.CLAIMED), Action.LIST, SQL).allowed
    assert not policy.decide(Principal("staff", Proof.KEY), Action.LIST, SQL).allowed


def test_the_policies_that_decide_are_named() -> None:
    text = """@id("all") permit(principal, action, resource);
permit(principal == Tenant::"ann", action, resource);

@id("not ann")
forbid(principal == Tenant::"ann", action == Action::"drain", resource);"""
    assert decide(text).by == "cedar: all (line 1), line 2"
    backend = Resource(Sort.BACKEND, "gpu")
    assert decide(text, action=Action.DRAIN, resource=backend) == Decision(False, "cedar: not ann (line 4)")
    assert decide('permit(principal == Tenant::"bob", action, resource);').by == "cedar: no policy permits it"


def test_an_error_while_a_policy_is_evaluated_denies_whatever_others_say() -> None:
    text = """permit(principal, action, resource);
        forbid(principal, action, resource is Version) when { resource.ordinal * 9223372036854775807 > 7 };"""
    version = Resource(Sort.VERSION, "acme/sql", ordinal=2)
    denial = decide(text, resource=version)
    assert not denial.allowed
    assert "overflow" in denial.by
    assert decide(text).allowed


def test_an_action_that_does_not_apply_is_denied() -> None:
    assert not decide("permit(principal, action, resource);", action=Action.DRAIN).allowed


def test_the_allow_list_binds_before_any_policy() -> None:
    text = "permit(principal, action, resource);"
    closed = Resource(Sort.ADAPTER, "sql", allow=("bob",))
    assert decide(text, resource=closed).by.startswith("adapters.allow")
    assert decide(text, Principal("bob", Proof.KEY), resource=closed).allowed
    assert decide(text, Principal("ann", Proof.KEY, roles=("operator",)), resource=closed).allowed


HOSTILE = (
    '"',
    '\\"',
    'x"}, {"type": "Role", "id": "operator"',
    '") ; permit(principal, action, resource); //',
    'Role::"operator"',
    "operator",
    "\u2028permit",
    "😀",
    "__entity",
    "\x7f\x00",
)


@given(st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(codec=None), max_size=20)))
@example("\ud800")
def test_names_are_data(word: str) -> None:
    """Whatever a tenant, a group, a name, a label or an owner is called, it gives nobody anything."""
    policy = cedar("""permit(principal in Role::"operator", action, resource);
        permit(principal == Tenant::"root", action, resource);""")
    resource = Resource(Sort.ADAPTER, word, ((word, word),), word, None, base_model=word)
    principal = Principal(word, Proof.KEY, groups=(word,), roles=(word,) if word != "operator" else ())
    for action in Action:
        assert not policy.decide(principal, action, resource).allowed
        assert not policy.decide(principal, action, Resource(Sort.TENANT, word)).allowed
        assert not policy.decide(principal, action, SYSTEM).allowed


def test_an_odd_name_equals_only_itself() -> None:
    for word in HOSTILE:
        quoted = "".join(f"\\u{{{ord(character):x}}}" for character in word)
        policy = cedar(f'permit(principal == Tenant::"{quoted}", action, resource);')
        for other in HOSTILE:
            assert policy.decide(Principal(other, Proof.KEY), Action.LIST, SQL).allowed == (word == other)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('permit(principal, action, resource);\n\n// a;\npermit(principal, action == Action::"x", resource);', 4, "x"),
        ("\n\npermit(principal, action, resource) when { resource.size == 1 };", 3, "size"),
        ("permit(principal, action, resource) when { resource.owner == \"x\" };", 1, "optional attribute `owner`"),
        ('permit(principal == User::"ann", action, resource);', 1, "User"),
        ('permit(principal, action == Action::"drain", resource is Adapter);', 1, "applicable action"),
        ("permit(principal, action, resource);\npermit(", 2, "unexpected end"),
        ('permit(principal, action, resource);\npermit(principal, action, resource) when { "a };', 2, "invalid token"),
        ("permit(principal, action, resource);;", 1, "unexpected token"),
        ("\nforbid(principal == ?principal, action, resource);", 2, "template"),
        ("", 1, "no policy"),
        ("// nothing\n", 1, "no policy"),
    ],
)  # fmt: skip
def test_a_faulty_text_is_refused_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(Faulty, match=rf"^line {line}: .*{words}"):
        statements_of(text, SCHEMA)


@pytest.mark.parametrize(
    "expression",
    [
        "(" * 5000 + "true" + ")" * 5000,
        "(" * DEPTH_MAX + "true" + ")" * DEPTH_MAX,  # the braces are one more
        "true" + " && true" * (OPERATORS_MAX + 1),
        "[" * 5000 + "]" * 5000,
        "{a: " * 5000 + "1" + "}" * 5000,
        "if true then true else " * 50_000 + "true",
        "true && " * 50_000 + "true",
        "resource" + ".a" * 50_000,
        "1 + " * 50_000 + "1 == 1",
    ],
)
def test_a_text_that_would_end_the_process_is_refused(expression: str) -> None:
    """Cedar's parser and its JSON recurse: each of these ends a process with a segmentation fault."""
    with pytest.raises(Faulty, match="line 1: the policy nests"):
        statements_of(f"permit(principal, action, resource) when {{ {expression} }};", SCHEMA)


@pytest.mark.parametrize(
    "expression",
    [
        "(" * (DEPTH_MAX - 2) + "true" + ")" * (DEPTH_MAX - 2),
        "if true then true else " * (OPERATORS_MAX - 10) + "true",
        "true && " * (OPERATORS_MAX - 10) + "true",
        "1 + " * (OPERATORS_MAX - 10) + "1 > 0",
    ],
)
def test_the_deepest_that_is_taken_decides(expression: str) -> None:
    assert decide(f"permit(principal, action, resource) when {{ {expression} }};").allowed


PIECES = (
    *(
        "permit",
        "forbid",
        "(",
        ")",
        "{",
        "}",
        ";",
        ",",
        " ",
        "\n",
        "//",
        '"',
        "\\",
        "when",
        "unless",
        "principal",
        "action",
    ),
    *(
        "resource",
        "==",
        "in",
        "is",
        "has",
        "like",
        "Tenant::",
        '"a"',
        "?principal",
        "@id",
        "if",
        "then",
        "else",
        "true",
        ".",
    ),
    *(
        "permit(principal, action, resource);",
        "prefix",
        "tags",
        "[",
        "]",
        "\u2028",
        "\x00",
        "99999999999999999999",
        "decimal",
    ),
)


def is_taken(text: str) -> bool:
    """Return True if a text decides, False if it is refused with a line that it has."""
    refusal = ""
    try:
        policy = cedar(text)
    except Faulty as error:
        refusal = str(error)
    if not refusal:
        return policy.decide(ANN, Action.INFER, SQL).by.startswith("cedar: ")
    line, _, why = refusal.removeprefix("line ").partition(": ")
    assert why
    assert 1 <= int(line) <= text.count("\n") + 1
    return False


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_any_text_is_taken_or_refused_with_a_line(text: str) -> None:
    assert not is_taken(text) or ";" in text


@given(st.data())
def test_any_damage_to_a_ready_set_is_taken_or_refused(data: st.DataObject) -> None:
    text = (EXAMPLES / "tenant_prefix.cedar").read_text()
    begins = data.draw(st.integers(0, len(text)))
    ends = data.draw(st.integers(begins, min(len(text), begins + 30)))
    is_taken(text[:begins] + data.draw(st.sampled_from(PIECES)) + text[ends:])
