"""Whom a token names, and for how long it is believed."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from sidecar.access import tokens
from sidecar.access.principal import Proof
from sidecar.access.tokens import KNOWN_S_MAX
from tests.kit.issuing import AUDIENCE, NAME, NOW, claims, house
from tests.kit.jwts import ALGORITHMS, Signer, base64url

KEY = Signer()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_token_of_each_algorithm_names_its_tenant(tmp_path: Path, algorithm: str) -> None:
    key = Signer(algorithm)
    async with house(tmp_path, key, algorithms=[algorithm]) as made:
        found = await made.tokens.verify(key.token(claims()))
    assert (found.tenant, found.subject, found.proof) == ("acme", "acme", Proof.TOKEN)
    assert (found.groups, found.klass, found.roles, found.expires_at) == ((), "", (), NOW + 600 + 30)


RFC7515_A2 = (
    "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVl"
    "fQ.cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7"
    "t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jz"
    "DwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe7"
    "7Rw"
)
RFC7515_A2_KEY = {
    "kty": "RSA",
    "n": "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS"
    "-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg6"
    "65xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyu"
    "XpoQ",
    "e": "AQAB",
}
RFC7515_A3 = (
    "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVl"
    "fQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
)
RFC7515_A3_KEY = {
    "kty": "EC",
    "crv": "P-256",
    "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
    "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
}


@pytest.mark.parametrize(("token", "key"), [(RFC7515_A2, RFC7515_A2_KEY), (RFC7515_A3, RFC7515_A3_KEY)])
async def test_the_signatures_of_rfc_7515_are_right(tmp_path: Path, token: str, key: dict[str, Any]) -> None:
    """Its appendices A.2 and A.3. Their claims have neither audience nor subject, which is only seen afterwards."""
    async with house(tmp_path, issuer="joe", beside=(key,)) as made:
        made.clock.now = 1_300_819_379
        await made.refused(token, "it has no claim aud,sub")
        await made.refused(token[:-4] + "AAAA", "its signature is invalid")


KUBERNETES = {
    "iss": NAME,
    "aud": [AUDIENCE],
    "exp": NOW + 3607,
    "iat": NOW,
    "nbf": NOW,
    "jti": "ea28ed49-2e11-4280-9ec5-bc3d1d84661a",
    "kubernetes.io": {
        "namespace": "acme",
        "node": {"name": "127.0.0.1", "uid": "58456cb0-dd00-45ed-b797-5578fdceaced"},
        "pod": {"name": "client-69cbfb9798-jv9gn", "uid": "778a530c-b3f4-47c0-9cd5-ab018fb64f33"},
        "serviceaccount": {"name": "client", "uid": "a087d5a0-e1dd-43ec-93ac-f13d89cd13af"},
        "warnafter": NOW + 3607,
    },
    "sub": "system:serviceaccount:acme:client",
}
"""The claims of a service account's token as Kubernetes' documentation shows them."""


@pytest.mark.parametrize(
    "options",
    [
        {"tenant_pattern": "system:serviceaccount:{tenant}:*"},
        {"tenant": "kubernetes.io.namespace"},
    ],
)
async def test_a_service_account_is_of_its_namespace(tmp_path: Path, options: dict[str, Any]) -> None:
    async with house(tmp_path, KEY, **options) as made:
        found = await made.tokens.verify(KEY.token(KUBERNETES))
    assert (found.tenant, found.subject) == ("acme", "system:serviceaccount:acme:client")


async def test_claims_name_tenant_groups_and_class(tmp_path: Path) -> None:
    """A dot steps into an object, and may be part of a name too."""
    options = {"tenant": "https://acme.example/tenant", "groups": "realm.groups", "class_claim": "plan.name"}
    async with house(tmp_path, KEY, **options) as made:
        said = {"https://acme.example/tenant": "acme", "realm": {"groups": ["dev", "ops"]}, "plan": {"name": "gold"}}
        found = await made.tokens.verify(KEY.token(claims(**said)))
        assert (found.tenant, found.groups, found.klass, found.subject) == ("acme", ("dev", "ops"), "gold", "acme")
        found = await made.tokens.verify(KEY.token(claims(**said | {"realm": {"groups": "dev"}})))
        assert found.groups == ("dev",)
        found = await made.tokens.verify(KEY.token(claims(**said | {"realm": None})))
        assert found.groups == ()
        await made.refused(KEY.token(claims(**said | {"plan": None})), "no claim plan.name with a text")
        await made.refused(KEY.token(claims(**said | {"plan": {"name": "x" * 129}})), "at most 128 are taken")
        await made.refused(KEY.token(claims(**said | {"plan.name": "free"})), "two claims that are called plan.name")
        await made.refused(KEY.token(claims(**said | {"realm": {"groups": [1]}})), "is not a list of texts")
        await made.refused(KEY.token(claims(**said | {"realm": {"groups": ["a\n"]}})), "a group .* has U[+]000A")


async def test_what_is_wrong_is_said_to_whoever_asks(tmp_path: Path) -> None:
    async with house(tmp_path, KEY, algorithms=["ES256"]) as made:
        refused = made.refused
        await refused(KEY.token(claims(exp=NOW - 31)), "it expired at 2027-01-15T07:59:29Z; get a new one")
        await refused(
            KEY.token(claims(nbf=NOW + 31)), "it is not valid before 2027-01-15T08:00:31Z; compare the clocks"
        )
        await refused(KEY.token(claims(iat=NOW + 31)), "it is not valid before 2027-01-15T08:00:31Z")
        await refused(KEY.token(claims(aud="other")), "it is meant for another audience")
        await refused(KEY.token(claims(iss="https://other.example")), "its issuer is not one that is trusted here")
        await refused(Signer(kid="two").token(claims()), "its issuer publishes no such key")
        await refused(Signer(name="other").token(claims()), "its signature is invalid")
        await refused(Signer("RS256").token(claims()), "its algorithm RS256 is not one that is accepted")
        await refused("not-a-token", "it is not a signed JWT")


async def test_the_clocks_may_differ_by_the_leeway_and_no_more(tmp_path: Path) -> None:
    """RFC 7519: not on or after `exp`, not before `nbf`."""
    async with house(tmp_path, KEY, leeway_s=30) as made:
        assert await made.tokens.verify(KEY.token(claims(exp=NOW - 29.5)))
        await made.refused(KEY.token(claims(exp=NOW - 30)), "it expired")
        assert await made.tokens.verify(KEY.token(claims(nbf=NOW + 30)))
        await made.refused(KEY.token(claims(nbf=NOW + 30.5)), "not valid before")


async def test_a_known_token_ends_when_it_expires(tmp_path: Path) -> None:
    async with house(tmp_path, KEY) as made:
        token = KEY.token(claims(exp=NOW + 100))
        first = await made.tokens.verify(token)
        made.clock.now += 100 + 29.5
        assert await made.tokens.verify(token) is first
        made.clock.now += 0.5
        await made.refused(token, "it expired")


async def test_a_known_token_is_verified_again_after_five_minutes(tmp_path: Path) -> None:
    async with house(tmp_path, KEY) as made:
        token = KEY.token(claims(exp=NOW + 10_000))
        first = await made.tokens.verify(token)
        made.clock.now += KNOWN_S_MAX
        again = await made.tokens.verify(token)
        assert again == first
        assert again is not first


async def test_a_known_token_ends_with_its_key(tmp_path: Path) -> None:
    """A token of the new key makes the verifier look, and what it then finds counts for all."""
    new = Signer(kid="two")
    async with house(tmp_path, KEY) as made:
        token = KEY.token(claims())
        assert await made.tokens.verify(token)
        made.publish(new)
        assert await made.tokens.verify(token)
        made.clock.now += 60
        assert await made.tokens.verify(new.token(claims()))
        await made.refused(token, "its issuer publishes no such key")


async def test_a_key_under_an_old_id_replaces_the_old_one(tmp_path: Path) -> None:
    other = Signer(name="replaced")
    async with house(tmp_path, KEY, Signer(kid="beside")) as made:
        token = KEY.token(claims())
        assert await made.tokens.verify(token)
        made.publish(other)
        made.clock.now += 60
        await made.refused(Signer(kid="nobody's").token(claims()), "no such key")
        await made.refused(token, "its signature is invalid")
        assert await made.tokens.verify(other.token(claims()))


async def test_a_token_without_a_key_id_is_tried_with_the_keys_that_fit(tmp_path: Path) -> None:
    """Keys of another type, use or algorithm are not tried."""
    nameless = Signer(kid=None)
    beside = (Signer("RS256").jwk, Signer("ES384").jwk, Signer().jwk | {"use": "enc"}, Signer().jwk | {"alg": "ES384"})
    async with house(tmp_path, nameless, beside=beside) as made:
        assert await made.tokens.verify(nameless.token(claims()))
        await made.refused(Signer(kid=None, name="other").token(claims()), "its signature is invalid")
        made.publish(Signer("RS256"))
        made.clock.now += 60
        await made.refused(Signer(kid=None, name="other").token(claims()), "its issuer publishes no such key")


async def test_keys_and_addresses_in_a_header_are_not_looked_at(tmp_path: Path) -> None:
    """Some issuers send their certificates with each token."""
    async with house(tmp_path, KEY) as made:
        header = {"x5c": ["MII" + "A" * 2000], "jku": "https://issuer.example/jwks", "x5t": "AAAA", "own": {"x": 1}}
        assert await made.tokens.verify(KEY.token(claims(), header))


async def test_a_token_without_a_key_id_is_tried_with_four_keys_at_most(tmp_path: Path) -> None:
    keys = [Signer(kid=None, name=f"{count}") for count in range(5)]
    async with house(tmp_path, *keys) as made:
        assert await made.tokens.verify(keys[3].token(claims()))
        await made.refused(keys[4].token(claims()), "its signature is invalid")


async def test_known_tokens_are_bounded_in_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was not used for longest is forgotten, and verified again when it comes."""
    monkeypatch.setattr(tokens, "KNOWN_MAX", 2)
    first, second, third = (KEY.token(claims(jti=f"{count}")) for count in range(3))
    async with house(tmp_path, KEY) as made:
        verify = made.tokens.verify
        of_first, of_second = await verify(first), await verify(second)
        assert await verify(first) is of_first
        await verify(third)
        assert await verify(first) is of_first
        assert await verify(second) is not of_second


async def test_known_tokens_are_bounded_in_bytes(tmp_path: Path) -> None:
    """3,000 tokens with 12 kB of groups: 36 MB of texts, were all kept."""
    async with house(tmp_path, KEY, groups="groups") as made:
        await made.tokens.verify(KEY.token(claims()))
        tracemalloc.start()
        try:
            for count in range(3000):
                await made.tokens.verify(KEY.token(claims(groups=[f"{count:04} " + "x" * 400] * 28 + [str(count)])))
            grown_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert grown_bytes < 24 << 20


async def test_the_size_of_a_token_is_limited(tmp_path: Path) -> None:
    async with house(tmp_path, KEY) as made:
        assert await made.tokens.verify(KEY.token(claims(more="x" * 12_000)))
        await made.refused(KEY.token(claims(more="x" * 12_400)), "it is longer than 16384 characters")
        await made.refused(base64url(b"\xff" * 1_000_000), "it is longer than 16384 characters")


@pytest.mark.parametrize("part", [0, 1])
async def test_a_part_that_is_nested_too_deeply_is_refused(tmp_path: Path, part: int) -> None:
    async with house(tmp_path, KEY) as made:
        parts = KEY.token(claims()).split(".")
        parts[part] = base64url(b'{"alg":' + b"[" * 1500 + b"]" * 1500 + b"}")
        await made.refused(".".join(parts))
