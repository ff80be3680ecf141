"""The chart's examples of access, asked with the credentials that they are for, as those who issue them write them."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.access.certificates import principal_of
from sidecar.access.configured import policy_of
from sidecar.access.keys_file import KeysFile
from sidecar.access.principal import Action, Principal, Proof, Resource, Sort
from sidecar.access.proving import names_in
from sidecar.config import Config, parse
from tests.kit.issuing import NOW, house
from tests.kit.jwts import Signer

EXAMPLES = Path(__file__).parents[2] / "deploy" / "helm" / "lora-sidecar" / "examples"
KEY = Signer("RS256")

KEYCLOAK: dict[str, Any] = {
    "exp": NOW + 300,
    "iat": NOW,
    "jti": "onrtac:34e1b9bf-3c48-1b3a-8f3a-7d7d3f6d1a52",
    "iss": "https://keycloak.example.org/realms/llm",
    "aud": ["lora-sidecar", "account"],
    "sub": "8f2a9d8e-7d0c-4b4a-9a5e-0d8a8c1a6f11",
    "typ": "Bearer",
    "azp": "acme-notebooks",
    "sid": "2f7f4c52-6a3e-4f0e-9d5a-9a5d9d4f4b34",
    "acr": "1",
    "realm_access": {"roles": ["offline_access", "default-roles-llm", "uma_authorization"]},
    "resource_access": {"account": {"roles": ["manage-account", "view-profile"]}},
    "scope": "email profile",
    "email_verified": True,
    "preferred_username": "jane",
    "tenant": "acme",
    "groups": ["/acme/ml", "/llm/publishers"],
}
"""An access token of Keycloak 26, with the claims of the three mappers."""
KUBERNETES: dict[str, Any] = {
    "aud": ["lora-sidecar"],
    "exp": NOW + 3600,
    "iat": NOW,
    "iss": "https://kubernetes.default.svc.cluster.local",
    "jti": "ea28ed49-2e11-4280-9ec5-bc3d1d84661a",
    "kubernetes.io": {
        "namespace": "acme",
        "node": {"name": "127.0.0.1", "uid": "58456cb0-dd00-45ed-b797-5578fdceaced"},
        "pod": {"name": "client-69cbfb9798-jv9gn", "uid": "778a530c-b3f4-47c0-9cd5-ab018fb64f33"},
        "serviceaccount": {"name": "client", "uid": "a087d5a0-e1dd-43ec-93ac-f13d89cd13af"},
    },
    "nbf": NOW,
    "sub": "system:serviceaccount:acme:client",
}
"""A projected token, as the documentation of Kubernetes shows one."""


def example(name: str) -> Config:
    values = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["config"]
    return parse({key: values[key] for key in ("identity", "access")}, name)


def may(config: Config, principal: Principal, action: Action, name: str) -> bool:
    return policy_of(config.access.policies).decide(principal, action, Resource(Sort.ADAPTER, name)).allowed


async def verified(config: Config, folder: Path, claims: dict[str, Any]) -> Principal:
    """Return whom a token of the example's issuer names; only where its keys come from is another place."""
    [issuer] = config.identity.issuers
    options = issuer.model_dump(exclude={"jwks", "jwks_ca", "jwks_token_file"})
    async with house(folder, KEY, **options) as made:
        return await made.tokens.verify(KEY.token(claims))


async def test_keycloak(tmp_path: Path) -> None:
    """Jane of acme uses and changes what is acme's and nothing else; without the group she changes nothing."""
    config = example("oidc")
    jane = await verified(config, tmp_path, KEYCLOAK)
    assert (jane.tenant, jane.groups) == ("acme", ("/acme/ml", "/llm/publishers"))
    john = await verified(config, tmp_path, KEYCLOAK | {"groups": ["/acme/ml"]})
    for action, name, jane_may, john_may in (
        (Action.INFER, "acme/sql", True, True),
        (Action.REGISTER, "acme/sql", True, False),
        (Action.INFER, "globex/sql", False, False),
        (Action.REGISTER, "globex/sql", False, False),
    ):
        assert (may(config, jane, action, name), may(config, john, action, name)) == (jane_may, john_may)
    operator = await verified(config, tmp_path, KEYCLOAK | {"groups": ["/llm/operators"]})
    assert may(config, operator, Action.PROMOTE, "globex/sql")


@pytest.mark.parametrize("changed", [{"aud": "account"}, {"tenant": None}, {"tenant": ["acme", "globex"]}])
async def test_keycloak_tokens_that_say_too_little(tmp_path: Path, changed: dict[str, Any]) -> None:
    """For another audience, or without the mapper of the tenant."""
    config = example("oidc")
    claims = {name: value for name, value in (KEYCLOAK | changed).items() if value is not None}
    options = config.identity.issuers[0].model_dump(exclude={"jwks", "jwks_ca", "jwks_token_file"})
    async with house(tmp_path, KEY, **options) as made:
        await made.refused(KEY.token(claims))


async def test_service_accounts(tmp_path: Path) -> None:
    """The namespace is the tenant; an account of the platform's namespace publishes for itself."""
    config = example("service-accounts")
    client = await verified(config, tmp_path, KUBERNETES)
    platform = await verified(config, tmp_path, KUBERNETES | {"sub": "system:serviceaccount:ml-platform:trainer"})
    assert (client.tenant, client.subject, platform.tenant) == ("acme", KUBERNETES["sub"], "ml-platform")
    assert may(config, client, Action.INFER, "acme/sql")
    assert not may(config, client, Action.REGISTER, "acme/sql")
    assert not may(config, client, Action.INFER, "ml-platform/sql")
    assert may(config, platform, Action.REGISTER, "ml-platform/sql")


async def test_the_api_servers_own_audience_is_not_enough(tmp_path: Path) -> None:
    """The token that every pod has anyway is for the API server."""
    options = example("service-accounts").identity.issuers[0].model_dump(exclude={"jwks", "jwks_ca", "jwks_token_file"})
    async with house(tmp_path, KEY, **options) as made:
        await made.refused(KEY.token(KUBERNETES | {"aud": ["https://kubernetes.default.svc.cluster.local"]}))


def test_the_list_of_keys_in_the_readme(tmp_path: Path) -> None:
    """It is a file of keys as the sidecar reads them; the hash is that of "test"."""
    text = (EXAMPLES.parent / "README.md").read_text().partition("`keys.yaml` is a list")[2]
    (tmp_path / "keys.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    hashed, clear = KeysFile(tmp_path / "keys.yaml").keys
    assert (hashed.tenant, hashed.sha256) == ("acme", sha256(b"test").hexdigest())
    assert (clear.roles, clear.groups, clear.klass, clear.note) == (("publisher",), ("ml",), "batch", "nightly job")


def test_istio() -> None:
    """The peer's namespace is the tenant, by the header as a sidecar of Istio appends it."""
    config = example("istio")
    header = (
        "By=spiffe://cluster.local/ns/llm/sa/pool-lora-sidecar;"
        "Hash=2b9cd0d4e2f2ee2d6ee3eb5f4e2b0a4ff2c8e4e8aac0c5fbd8f1d9f9a6ea5b23;"
        'Subject="";URI=spiffe://cluster.local/ns/acme/sa/client'
    )
    wanted = config.identity.certificates
    assert wanted.forwarded is not None
    client = principal_of(names_in([header]), wanted.tenant_pattern, Proof.FORWARDED)
    assert client.tenant == "acme"
    assert may(config, client, Action.INFER, "acme/sql")
    assert not may(config, client, Action.INFER, "globex/sql")
