"""What the configuration of issuers and certificates refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from sidecar.config.identity import Certificates, Identity, Issuer
from sidecar.config.sources import data_of

GOOD = {"issuer": "https://issuer.example", "audience": "lora-sidecar", "jwks": "https://issuer.example/jwks"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"jwks": "http://issuer.example/jwks"}, "jwks over http can be forged on its way"),
        ({"jwks": "ftp://issuer.example/jwks"}, "jwks must be an https URL or a file"),
        ({"jwks": "https://user:secret@issuer.example/jwks"}, "jwks holds a password"),
        (
            {"jwks": "/etc/jwks.json", "jwks_ca": "/etc/ca.pem"},
            "jwks is a file; jwks_ca and jwks_token_file are for a URL",
        ),
        ({"jwks": "/etc/jwks.json", "jwks_token_file": "/etc/token"}, "jwks is a file"),
        ({"algorithms": ["HS256"]}, "Input should be 'RS256'"),
        ({"algorithms": ["none"]}, "Input should be 'RS256'"),
        ({"algorithms": []}, "at least 1 item"),
        ({"leeway_s": 3600}, "less than or equal to 300"),
        ({"tenant": ""}, "it must name a claim"),
        ({"tenant": "kubernetes.io."}, "it must name a claim"),
        ({"groups": "realm_access..roles"}, "it must name a claim"),
        ({"groups": "$.groups"}, "a path begins with the name of a claim, not with $"),
        ({"class_claim": "class "}, "it must name a claim"),
        ({"tenant_pattern": "acme"}, "it must contain {tenant} once"),
        ({"tenant_pattern": "{tenant}/{tenant}"}, "it must contain {tenant} once"),
        ({"tenant_pattern": "{tenant}-*"}, "the tenant would be a guess"),
        ({"tenant_pattern": "spiffe://*.{tenant}/sa"}, "the tenant would be a guess"),
    ],
)
def test_what_cannot_be_trusted_is_refused(changed: dict[str, Any], said: str) -> None:
    assert Issuer(**GOOD)
    with pytest.raises(ValidationError) as caught:
        Issuer(**GOOD | changed)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "path", ["sub", "kubernetes.io.namespace", "https://example.com/claims.tenant", "custom:tenant"]
)
def test_claims_have_the_names_that_issuers_give_them(path: str) -> None:
    assert Issuer(**GOOD, groups=path).groups == path


@pytest.mark.parametrize("asserted", [False, "yes", None])
def test_a_forwarded_certificate_needs_the_assertion(asserted: object) -> None:
    with pytest.raises(ValidationError, match="strict_mutual_tls"):
        Certificates.model_validate({"forwarded": {"strict_mutual_tls": asserted}})


@pytest.mark.parametrize("mode", ["off", '"off"', "observe", "enforce"])
def test_a_mode_may_be_written_bare(mode: str) -> None:
    """YAML reads a bare off as false."""
    assert Identity.model_validate(data_of(f"mode: {mode}", "a file")).mode == mode.strip('"')


@pytest.mark.parametrize("mode", ["on", "yes", "no-such", "1", "null"])
def test_other_modes_are_refused(mode: str) -> None:
    with pytest.raises(ValidationError, match="'off', 'observe' or 'enforce'"):
        Identity.model_validate(data_of(f"mode: {mode}", "a file"))


def test_a_mode_that_refuses_everybody_is_refused() -> None:
    with pytest.raises(ValidationError, match="refuses everybody"):
        Identity(mode="enforce", keys=False)
    assert Identity(mode="observe", keys=False)
    assert Identity(mode="enforce", keys=False, issuers=(Issuer(**GOOD),))


CHECKED = {"mode": "enforce", "external": {"address": "127.0.0.1:9191"}}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"address": "opa"}, "it must be HOST:PORT, as opa.policy.svc:9191, or unix:/PATH"),
        ({"address": "unix:opa.sock"}, "it must be HOST:PORT"),
        ({"address": "127.0.0.1:0"}, "it must be HOST:PORT"),
        ({"address": "opa.policy.svc:9191"}, "clients' credentials would go there in clear text"),
        ({"timeout_s": 0}, "greater than 0"),
        ({"timeout_s": 60}, "less than or equal to 10"),
        ({"in_flight_max": 0}, "greater than or equal to 1"),
        ({"headers": ["a header"]}, "it must name a header"),
        ({"headers": ["x-trace-bin"]}, "binary metadata of gRPC"),
        ({"context_extensions": {"tenant": "acme"}}, "tenant is what the sidecar says of each call"),
        ({"proves": True}, "external.proves with keys: two would say whose a call is; set keys: false"),
    ],
)
def test_an_external_check_that_cannot_be_trusted_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Identity.model_validate(CHECKED | {"external": CHECKED["external"] | changed})  # type: ignore[operator]
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"address": "unix:/run/opa.sock"},
        {"address": "[::1]:9191"},
        {"address": "opa.policy.svc:9191", "tls": {}},
        {"address": "opa.policy.svc:9191", "allow_cleartext": True},
        {"headers": []},
    ],
)
def test_an_external_check_is_near_or_its_way_is_encrypted(changed: dict[str, Any]) -> None:
    assert Identity.model_validate(CHECKED | {"external": CHECKED["external"] | changed}).external  # type: ignore[operator]


def test_headers_are_named_in_lower_case() -> None:
    given = {"address": "127.0.0.1:9191", "headers": ["X-Team"]}
    found = Identity.model_validate(CHECKED | {"external": given}).external
    assert found is not None
    assert found.headers == ("x-team",)


def test_off_refuses_an_external_check() -> None:
    with pytest.raises(ValidationError, match="external with mode: off: every client is believed then"):
        Identity.model_validate(CHECKED | {"mode": "off"})
    assert Identity.model_validate(CHECKED | {"mode": "observe"})


def test_one_alone_proves() -> None:
    """With `proves` no other credential may be taken, and nothing else is needed."""
    proves = {"external": {"address": "127.0.0.1:9191", "proves": True}, "keys": False}
    assert Identity.model_validate(CHECKED | proves)
    for beside in ({"issuers": [GOOD]}, {"certificates": {"enabled": True}}):
        with pytest.raises(ValidationError, match="two would say whose a call is; leave"):
            Identity.model_validate(CHECKED | proves | beside)
    with pytest.raises(ValidationError, match="refuses everybody"):
        Identity.model_validate(CHECKED | {"keys": False})
