"""`access check`: the words of a question become the questions that a request would be asked."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cedarpy", reason="needs the extra cedar")

from sidecar.access.access import Access, Caller
from sidecar.access.cedar_text import statements_of
from sidecar.access.checking import HIDDEN, Answer, Known, check, principal_asked, seen_by
from sidecar.access.configured import policy_of
from sidecar.access.deciding import CachedPolicy
from sidecar.access.policy import Roles
from sidecar.access.policy_file import SCHEMA, CedarPolicy
from sidecar.access.principal import Principal
from sidecar.cli import run
from sidecar.config.access import Policies
from sidecar.config.identity import Identity
from sidecar.errors import Refused
from sidecar.state.records import Record, added, promoted
from tests.kit.corekit import adapter_of
from tests.kit.jwts import Signer, jwks_of

EXAMPLES = Path(__file__).parents[2] / "examples" / "access"


def record() -> Record:
    first, _ = added(None, "acme/sql", adapter_of("one"), "/a", now=0.0)
    second, _ = added(first, "acme/sql", adapter_of("two"), "/b", now=0.0)
    return promoted(second, 2)


RECORD = record()
KNOWN = Known({"acme/sql": RECORD}.get, {"base", "llama"}.__contains__)
ROLES = policy_of(Policies(ready="roles", roles={"eve": ("viewer",), "acme": ("publisher",)}))


def in_cedar(text: str) -> CachedPolicy:
    return CachedPolicy(CedarPolicy(statements_of(text, SCHEMA), Roles({}), "/"))


def asked_of_itself(policy: CachedPolicy, principal: Principal, action: str, name: str, known: Known = KNOWN) -> Answer:
    return check(policy, seen_by(policy, known, principal), principal, action, name)


def asked(action: str, name: str, tenant: str = "zoe", policy: CachedPolicy = ROLES) -> Answer:
    return check(policy, KNOWN, principal_asked(tenant, (), ()), action, name)


@pytest.mark.parametrize(
    ("tenant", "action", "name", "allowed"),
    [
        ("zoe", "infer", "acme/sql", True),
        ("zoe", "infer", "acme/sql@v2", True),  # the current one
        ("zoe", "infer", "acme/sql@v1", False),
        ("eve", "infer", "acme/sql@v1", True),
        ("eve", "infer_version", "acme/sql@v1", True),
        ("eve", "infer", f"acme/sql@{RECORD.versions[0].adapter.digest[:8]}", True),
        ("zoe", "infer", f"acme/sql@{RECORD.versions[0].adapter.digest[:8]}", False),
        ("zoe", "infer", "llama", True),
        ("zoe", "infer", "base", True),
        ("zoe", "list", "acme/sql", False),
        ("eve", "list", "acme/sql", True),
        ("eve", "register", "new/name", False),
        ("acme", "register", "new/name", True),
        ("acme", "drain", "gpu-0", False),
        ("acme", "cancel", "acme", True),
        ("acme", "cancel", "eve", False),
        ("acme", "cancel", "", False),
        ("eve", "see_queue", "eve", True),
        ("acme", "manage", "", False),
    ],
)
def test_a_question_in_words(tenant: str, action: str, name: str, allowed: bool) -> None:
    assert asked(action, name, tenant).allowed is allowed


def test_an_owner_that_its_list_leaves_out_registers_and_changes_nothing_else() -> None:
    """As the admin listener answers: there the name is hidden from it."""
    policy = policy_of(Policies(ready="tenant_prefix", roles={"acme": ("publisher",)}))
    known = Known({"acme/sql": replace(RECORD, allow=("globex",))}.get, KNOWN.is_base)
    answers = {
        action: check(policy, known, principal_asked("acme", (), ()), action, "acme/sql").allowed
        for action in ("register", "promote", "evict", "pause", "show")
    }
    assert answers == {"register": True, "promote": False, "evict": False, "pause": False, "show": False}


def test_the_version_that_was_judged_is_told() -> None:
    assert asked("infer", "acme/sql").version == "v2", "the current one"
    assert asked("infer", "acme/sql@v1").version == "v1"
    assert asked("list", "acme/sql").version == "", "the name as a whole"
    assert asked("infer", "llama").version == ""
    assert asked("infer", "new/name").version == "", "none is there"


@pytest.mark.parametrize(
    ("tenant", "action", "name", "hidden"),
    [
        ("zoe", "infer", "acme/sql", False),
        ("zoe", "list", "acme/sql", False),  # it may infer, so it may know
        ("zoe", "infer", "acme/sql@v1", True),
        ("zoe", "infer", "acme/sql@v9", True),
        ("zoe", "infer", "acme/sql@v2", False),
        ("eve", "infer", "acme/sql@v1", False),
        ("eve", "infer", "acme/sql@v9", True),
        ("eve", "infer", "other", True),
        ("eve", "promote", "other", True),
        ("eve", "register", "other", False),
        ("eve", "infer", "llama", False),
        ("eve", "cancel", "other", False),
    ],
)
def test_what_one_may_not_know_of(tenant: str, action: str, name: str, hidden: bool) -> None:
    """A name that is there and hidden, and one that is not there, are the same."""
    assert (asked_of_itself(ROLES, principal_asked(tenant, (), ()), action, name) == HIDDEN) is hidden


SECRET = replace(RECORD, name="blue/secret", allow=("blue",))
WITH_SECRET = Known({"acme/sql": RECORD, "blue/secret": SECRET}.get, KNOWN.is_base)


@pytest.mark.parametrize("role", ["", "viewer", "publisher"])
@pytest.mark.parametrize("ready", ["open", "tenant_prefix", "roles"])
def test_to_register_tells_of_a_hidden_name_what_register_tells(ready: str, role: str) -> None:
    """Register refuses a publisher a name with another's list and lets it have a new one; to others it says no."""
    policy, acme = policy_of(Policies(ready=ready)), principal_asked("acme", (), (role,) if role else ())
    hidden, missing = (asked_of_itself(policy, acme, "register", f"blue/{n}", WITH_SECRET) for n in ("secret", "none"))
    if role == "publisher" and ready != "tenant_prefix":
        assert (hidden, missing.allowed) == (HIDDEN, True)
    else:
        assert hidden == missing
        assert not missing.allowed
    for action in ("infer", "list", "show", "promote", "evict", "pause"):
        for name in ("blue/secret", "blue/secret@v1", "blue/none"):
            assert asked_of_itself(policy, acme, action, name, WITH_SECRET) == HIDDEN


def test_a_name_that_is_hidden_by_its_list_from_its_owner_is_registered_as_a_new_one() -> None:
    policy = policy_of(Policies(ready="tenant_prefix"))
    known = Known({"acme/x": replace(SECRET, name="acme/x")}.get, KNOWN.is_base)
    acme = principal_asked("acme", (), ("publisher",))
    answers = [asked_of_itself(policy, acme, "register", name, known) for name in ("acme/x", "acme/y")]
    assert answers == [Answer(True, "tenant_prefix: acme/ belongs to acme")] * 2


LABELLED, _ = added(RECORD, "acme/sql", adapter_of("three"), "/c", now=0.0, labels=(("unreleased", "yes"),))
"""v1, v2 and the current v3, which the policies hide."""
UNRELEASED = """permit(principal == Tenant::"acme", action, resource)
when { resource is Adapter || resource is Version };
@id("unreleased versions are hidden")
forbid(principal, action, resource is Version) when { resource.hasTag("unreleased") };"""


def test_a_hidden_version_is_told_no_more_than_one_that_is_not_there() -> None:
    policy, known = in_cedar(UNRELEASED), Known({"acme/sql": LABELLED}.get, KNOWN.is_base)
    acme = principal_asked("acme", (), ())
    digest = LABELLED.versions[2].adapter.digest
    for name in ("acme/sql", "acme/sql@v3", "acme/sql@v9", f"acme/sql@{digest[:8]}", "acme/sql@ffffffff"):
        assert asked_of_itself(policy, acme, "infer", name, known) == HIDDEN, name
    for action in ("infer_version", "list", "show", "promote", "evict", "pause"):
        for name in ("acme/sql@v3", "acme/sql@v9"):
            assert asked_of_itself(policy, acme, action, name, known) == HIDDEN, (action, name)
    assert asked_of_itself(policy, acme, "infer", "acme/sql@v2", known).version == "v2"
    told = check(policy, known, acme, "infer", "acme/sql")
    assert (told.version, "unreleased" in told.by) == ("v3", True), "to who manages access"


def test_a_version_that_answers_and_is_not_listed_is_not_told() -> None:
    infers = '@id("the name") permit(principal, action == Action::"infer", resource is Adapter);'
    policy = in_cedar(f'{infers} @id("the version") permit(principal, action == Action::"infer", resource is Version);')
    answer = asked_of_itself(policy, principal_asked("acme", (), ()), "infer", "acme/sql")
    assert answer == Answer(True, "cedar: the name (line 1)")


@pytest.mark.parametrize("is_itself", [True, False])
def test_a_canary_answers_where_the_current_version_may_not(is_itself: bool) -> None:
    policy, known = in_cedar(UNRELEASED), Known({"acme/sql": promoted(LABELLED, 1, 10)}.get, KNOWN.is_base)
    acme = principal_asked("acme", (), ())
    answer = check(policy, seen_by(policy, known, acme) if is_itself else known, acme, "infer", "acme/sql")
    assert (answer.allowed, answer.version) == (True, "v1")
    access = Access(Identity(mode="enforce"), "none", known.record_of, policy, None, by_version=True)
    assert access.permit(Caller(acme, proven=acme), "acme/sql", "id").versions == (1,)


@pytest.mark.parametrize("action", ["infer", "list", "show", "register", "promote"])
def test_a_base_model_that_is_forbidden_looks_like_none(action: str) -> None:
    acme = principal_asked("acme", (), ())
    policies = (
        in_cedar('permit(principal in Role::"operator", action, resource);'),
        in_cedar('permit(principal, action, resource is Base) when { principal == Tenant::"blue" };'),
    )
    for policy in policies:
        assert asked_of_itself(policy, acme, action, "llama") == asked_of_itself(policy, acme, action, "lama")
    assert asked_of_itself(policies[1], principal_asked("blue", (), ()), "infer", "llama").allowed


def test_a_hidden_adapter_with_the_name_of_a_base_model_is_none_as_to_a_request() -> None:
    policy, known = policy_of(Policies()), Known({"llama": replace(SECRET, name="llama")}.get, KNOWN.is_base)
    assert asked_of_itself(policy, principal_asked("acme", (), ()), "infer", "llama", known) == HIDDEN


@pytest.mark.parametrize("name", ["acme/sql@v1", "acme/sql@v9", "acme/sql@", "blue/secret@v1", "none@v1"])
def test_to_register_has_no_version_whatever_is_there(name: str) -> None:
    for known in (WITH_SECRET, seen_by(ROLES, WITH_SECRET, Principal("acme"))):
        with pytest.raises(Refused, match=f"needs a name without a version: '{name.partition('@')[0]}'"):
            check(ROLES, known, Principal("acme"), "register", name)


@pytest.mark.parametrize(
    ("action", "name", "words"),
    [
        ("fly", "acme/sql", "there are infer, "),
        ("infer", "", "needs a name"),
        ("infer_version", "acme/sql", '"acme/sql@v8"'),
        ("infer", "acme/sql@v3", "it has v1, v2"),
        ("infer", "acme/sql@", None),
        ("infer", "acme/sql@\n", r"'\\n'"),
    ],
)
def test_a_question_that_has_no_answer_says_why(action: str, name: str, words: str | None) -> None:
    if words is None:
        assert asked(action, name).allowed
        return
    with pytest.raises(Refused, match=words):
        asked(action, name)


def answers(access: Access, principal: Principal, reference: str) -> bool:
    """Return True if a request for the reference is answered by the version that it wants."""
    selector = reference.partition("@")[2]
    try:
        permit = access.permit(Caller(principal, proven=principal), reference, "id")
    except Refused:
        return False
    return permit.versions is None or (int(selector[1:]) if selector else RECORD.current) in permit.versions


IN_CEDAR = """permit(principal == Tenant::"zoe", action, resource is Version);
permit(principal == Tenant::"eve", action, resource is Adapter);
permit(principal == Tenant::"acme", action == Action::"infer", resource);
permit(principal == Tenant::"beta", action, resource) when { !(resource is Version && resource.current) };"""


@pytest.mark.parametrize("reference", ["acme/sql", "acme/sql@v1", "acme/sql@v2"])
@pytest.mark.parametrize("tenant", ["zoe", "eve", "acme", "beta"])
def test_it_answers_as_a_request_is_answered(tenant: str, reference: str) -> None:
    """The way of a request decides: what it may not have is refused, or no version may answer."""
    principal = principal_asked(tenant, (), ())
    for policy in (ROLES, in_cedar(IN_CEDAR)):
        access = Access(Identity(mode="enforce"), "none", KNOWN.record_of, policy, None, by_version=True)
        expected = answers(access, principal, reference)
        assert asked("infer", reference, tenant, policy).allowed is expected, policy.source
        assert asked_of_itself(policy, principal, "infer", reference).allowed is expected, policy.source


def shell(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = run(["access", "check", *arguments])
    return code, capsys.readouterr().out.strip()


def test_a_configuration_is_asked_without_a_sidecar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sidecar.yaml"
    policies = {"ready": "tenant_prefix", "roles": {"acme": ["publisher"], "group:ops": ["operator"]}}
    path.write_text(json.dumps({"access": {"policies": policies}, "adapters": {"allow": {"shared": ["zoe"]}}}))
    ask = ("--config", str(path), "--as")
    assert shell(capsys, *ask, "acme", "--may", "infer", "acme/sql") == (0, "allowed")
    explained = (0, "allowed by tenant_prefix: acme/ belongs to acme")
    assert shell(capsys, *ask, "acme", "--may", "promote", "acme/sql@v8", "--explain") == explained
    assert shell(capsys, *ask, "zoe", "--may", "infer", "acme/sql") == (1, "denied")
    assert shell(capsys, *ask, "zoe", "shared") == (0, "allowed")
    assert shell(capsys, *ask, "acme", "shared")[0] == 1
    assert shell(capsys, *ask, "zoe", "--group", "ops", "--may", "drain", "gpu-0") == (0, "allowed")
    assert shell(capsys, *ask, "zoe", "--role", "operator", "--may", "manage") == (0, "allowed")
    assert run(["access", "check", *ask, "zoe", "--role", "king", "sql"]) == 2
    assert '--role: there is no role "king"; there are operator, publisher, viewer' in capsys.readouterr().err
    code, out = shell(capsys, *ask, "zoe", "--may", "list", "acme/sql", "--json")
    assert (code, json.loads(out)["allowed"], json.loads(out)["source"]) == (1, False, "tenant_prefix")


def test_labels_are_given_where_no_registry_has_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cedar = tmp_path / "policies.cedar"
    cedar.write_text(
        '@id("ml") permit(principal, action, resource is Adapter)'
        'when { resource.hasTag("team") && resource.getTag("team") == "ml" && resource has owner };'
    )
    path = tmp_path / "sidecar.yaml"
    path.write_text(json.dumps({"access": {"policies": {"cedar": str(cedar)}}}))
    ask = ("--config", str(path), "--as", "zoe", "--may", "list", "sql", "--explain")
    assert shell(capsys, *ask) == (1, "denied by cedar: no policy permits it")
    labels = ("--label", "team=ml", "--label", "owner=ann")
    assert shell(capsys, *ask, *labels) == (0, "allowed by cedar: ml (line 1)")


def test_a_faulty_file_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cedar = tmp_path / "policies.cedar"
    cedar.write_text("\npermit(principal, action, resource) when { resource.size > 1 };")
    path = tmp_path / "sidecar.yaml"
    path.write_text(json.dumps({"access": {"policies": {"cedar": str(cedar)}}}))
    assert run(["access", "check", "--config", str(path), "--as", "zoe", "sql"]) == 2
    assert f"{cedar}: line 2: attribute `size`" in capsys.readouterr().err
    assert run(["config", "check", str(path)]) == 2
    assert f"{cedar}: line 2: attribute `size`" in capsys.readouterr().err


def config_check(capsys: pytest.CaptureFixture[str], path: Path, **sections: object) -> tuple[int, str, str]:
    file = path / "sidecar.yaml"
    file.write_text(json.dumps(sections))
    code = run(["config", "check", str(file)])
    captured = capsys.readouterr()
    notes = [line for line in captured.out.splitlines() if line.startswith("# ")]
    return code, "\n".join(note for note in notes if not note.startswith("# backends is empty")), captured.err


ISSUER = {"issuer": "https://issuer.example", "audience": "lora-sidecar"}


def test_the_files_of_keys_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All problems at once, each with its key and its file, and of a file of keys no secret."""
    keys, jwks = tmp_path / "keys.yaml", tmp_path / "jwks.json"
    sections: dict[str, Any] = {
        "identity": {"keys_file": str(keys), "issuers": [{**ISSUER, "jwks": str(jwks), "class_claim": "class"}]},
        "access": {"limits": [{"class_name": "*", "concurrent": 1}, {"class_name": "bth", "concurrent": 1}]},
    }
    code, _, error = config_check(capsys, tmp_path, **sections)
    assert (code, f"identity.keys_file: {keys}: No such file" in error) == (2, True)
    assert f"identity.issuers.0.jwks: {jwks}: No such file" in error
    keys.write_text(f"- {{tenant: acme, key: {'s' * 16}, class: btch}}\n")
    jwks.write_text('{"keys": ')
    code, _, error = config_check(capsys, tmp_path, **sections)
    assert f'{keys}: entry 1: class: there is no class "btch"; there are default' in error
    assert f"identity.issuers.0.jwks: {jwks}: it is no JWKS" in error
    assert 'access.limits.1.class_name: there is no class "bth"; there are default' in error
    assert (code, "s" * 16 in error) == (2, False)
    jwks.write_text('{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}')
    code, _, error = config_check(capsys, tmp_path, **sections)
    assert (code, f"{jwks}: key 0 cannot be used: its type (kty)" in error, "no key that verifies" in error) == (
        2, True, True,
    )  # fmt: skip
    keys.write_text(f"- {{tenant: acme, key: {'s' * 16}, class: batch}}\n")
    entries = [*json.loads(jwks_of(Signer(kid="one")))["keys"], {"kty": "oct", "k": "c2VjcmV0"}]
    jwks.write_text(json.dumps({"keys": entries}))
    known: dict[str, Any] = {"queue": {"classes": {"batch": {}, "bth": {}}}}
    code, notes, error = config_check(capsys, tmp_path, **sections | known)
    assert (code, error) == (0, "")
    assert f"{jwks}: key 1 cannot be used" in notes
    del sections["access"]
    keys.write_text("[]")
    _, notes, _ = config_check(capsys, tmp_path, **sections)
    assert "identity.issuers.0.class_claim: queue.classes has no class but default" in notes


def test_a_limit_that_nothing_matches_or_no_file_keeps_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = [{"tenant": "acme", "tokens_per_hour": 2**63}, {"tenant": "a\0b", "concurrent": 1}]
    code, _, error = config_check(capsys, tmp_path, access={"limits": limits})
    assert code == 2
    assert f"access.limits.0.tokens_per_hour: it must be less than or equal to {10**15} (it is {2**63})" in error
    assert "access.limits.1.tenant: the tenant has U+0000 at 1" in error


def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody writes to it: who reads it as a file waits for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    identity = {"keys_file": str(pipe), "issuers": [{**ISSUER, "jwks": str(pipe)}]}
    code, _, error = config_check(capsys, tmp_path, identity=identity)
    assert code == 2
    assert f"identity.keys_file: {pipe}: it is no file" in error
    assert f"identity.issuers.0.jwks: {pipe}: it is no file" in error


@pytest.mark.parametrize("name", ["groups:ops", "Group:ops", "group :ops", "group:", " ops", ""])
def test_a_role_for_nobody_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = config_check(capsys, tmp_path, access={"policies": {"roles": {name: ["viewer"]}}})
    assert (code, "access.policies.roles: " in error) == (2, True), error


def test_a_role_that_may_be_meant_for_others_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("gruop:ops", "*", "group:ops", "system:serviceaccount:a:b", "spiffe://c/a")
    roles = {"roles": {name: ["viewer"] for name in names}}
    code, notes, error = config_check(capsys, tmp_path, access={"policies": roles})
    assert (code, error) == (0, "")
    assert notes.splitlines() == [
        '# access.policies.roles.gruop:ops: a tenant is called so; a group would be "group:ops"',
        "# access.policies.roles.*: * stands for itself; list each tenant or group, or use Cedar",
    ]


def test_a_role_for_a_group_wants_a_claim_of_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    access = {"policies": {"roles": {"group:ops": ["viewer"]}}}
    issuer = {**ISSUER, "jwks": "https://issuer.example/jwks"}
    _, notes, _ = config_check(capsys, tmp_path, access=access, identity={"issuers": [issuer]})
    assert "access.policies.roles.group:ops: no issuer has groups" in notes
    for identity in ({"issuers": [{**issuer, "groups": "groups"}]}, {}):
        assert config_check(capsys, tmp_path, access=access, identity=identity) == (0, "", "")


def test_the_caller_itself_has_its_own_principal() -> None:
    mine = Principal("eve")
    assert not check(ROLES, KNOWN, mine, "list", "acme/sql").allowed, "nothing proves it"
