"""`access check`: the words of a question become the questions that a request would be asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.access.access import Access, Caller
from sidecar.access.cedar import SCHEMA, CedarPolicy
from sidecar.access.cedar_text import statements_of
from sidecar.access.checking import Answer, Known, check, is_hidden, principal_asked
from sidecar.access.deciding import CachedPolicy, policy_of
from sidecar.access.policy import Roles
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
    assert is_hidden(ROLES, KNOWN, principal_asked(tenant, (), ()), action, name) is hidden


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
    for policy in (ROLES, CachedPolicy(CedarPolicy(statements_of(IN_CEDAR, SCHEMA), Roles({}), "/"))):
        access = Access(Identity(mode="enforce"), "none", KNOWN.record_of, policy, None, by_version=True)
        expected = answers(access, principal, reference)
        assert asked("infer", reference, tenant, policy).allowed is expected, policy.source


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
    return code, "\n".join(line for line in captured.out.splitlines() if line.startswith("# ")), captured.err


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
