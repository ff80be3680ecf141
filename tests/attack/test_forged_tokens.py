"""Tokens that someone made up, changed, or was given for another purpose: each is refused, in words without the token.

Each attack is on a verifier that takes the honest token which the attack was made from.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar.access.principal import Principal
from sidecar.errors import Misused, Reason
from tests.kit.issuing import NAME, NOW, House, claims, house
from tests.kit.jwts import Signer, base64url, unsigned

RSA, EC = Signer("RS256", "rsa"), Signer("ES256", "ec")
MALLORY = Signer("RS256", "rsa", name="mallory")
SHORT_MALLORY = Signer("ES256", "ec", name="mallory")
"""Keys of the attacker, by the ids of honest ones."""


def hs256(header: dict[str, Any], secret: bytes) -> str:
    text = unsigned(header, claims())
    return f"{text}.{base64url(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"


def public(encoding: serialization.Encoding, form: serialization.PublicFormat) -> bytes:
    return bytes(RSA.private.public_key().public_bytes(encoding, form))


PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER
SPKI, PKCS1 = serialization.PublicFormat.SubjectPublicKeyInfo, serialization.PublicFormat.PKCS1
PUBLIC = {
    "PEM": public(PEM, SPKI),
    "PEM without the last line end": public(PEM, SPKI)[:-1],
    "PEM of PKCS 1": public(PEM, PKCS1),
    "PEM of PKCS 1 without the last line end": public(PEM, PKCS1)[:-1],
    "DER": public(DER, SPKI),
    "DER of PKCS 1": public(DER, PKCS1),
    "JWK": json.dumps(RSA.jwk).encode(),
}
WITH_KEY = RSA.token(claims(), {"jwk": RSA.jwk}).rpartition(".")[0]
HEADER, CLAIMS, SIGNATURE = RSA.token(claims()).split(".")


def with_key(**header: Any) -> str:
    return MALLORY.token(claims(), header)


def der(said: dict[str, Any]) -> bytes:
    """Return an honest signature in the form of X.509, which RFC 7518 does not have."""
    text = unsigned({"alg": "ES256", "kid": "ec"}, said)
    return bytes(EC.private.sign(text.encode(), ec.ECDSA(hashes.SHA256())))


def raw(text: str) -> str:
    """Return a token of the honest issuer with claims as they are written."""
    return RSA.token(text.encode())


FORGED: dict[str, str] = {
    "no algorithm": unsigned({"alg": "none"}, claims()) + ".",
    "no algorithm, by id": unsigned({"alg": "none", "kid": "rsa"}, claims()) + ".",
    "no algorithm, in other letters": unsigned({"alg": "nOnE", "kid": "rsa"}, claims()) + ".",
    "no algorithm, with a signature": unsigned({"alg": "none", "kid": "rsa"}, claims()) + f".{SIGNATURE}",
    "no signature": f"{HEADER}.{CLAIMS}.",
    "no third part": f"{HEADER}.{CLAIMS}",
    "a fourth part": f"{HEADER}.{CLAIMS}.{SIGNATURE}.x",
    **{
        f"HMAC with the public key as {form}, by id {kid}": hs256(
            {"alg": "HS256"} | ({} if kid is None else {"kid": kid}), secret
        )
        for form, secret in PUBLIC.items()
        for kid in ("rsa", None)
    },
    "HMAC with the modulus": hs256({"alg": "HS256", "kid": "rsa"}, RSA.jwk["n"].encode()),
    "HMAC with an empty secret": hs256({"alg": "HS256", "kid": "rsa"}, b""),
    "HMAC with a secret that the issuer publishes": hs256({"alg": "HS256", "kid": "shared"}, b"0" * 32),
    "a stranger's key by an honest id": MALLORY.token(claims()),
    "a stranger's key without an id": Signer("RS256", None, name="mallory").token(claims()),
    "the other key's id": RSA.token(claims(), {"kid": "ec"}),
    "an algorithm for a key of another type": RSA.token(claims(), {"alg": "ES256"}),
    "an algorithm that is not accepted": Signer("PS256", "rsa").token(claims()),
    "changed claims": f"{HEADER}.{base64url(json.dumps(claims(sub='globex')).encode())}.{SIGNATURE}",
    "changed header": unsigned({"alg": "RS256", "kid": "rsa"}, claims()) + f".{SIGNATURE}",
    "a signature of zeros": unsigned({"alg": "ES256", "kid": "ec"}, claims()) + "." + base64url(bytes(64)),
    "a signature as DER": unsigned({"alg": "ES256", "kid": "ec"}, claims()) + "." + base64url(der(claims())),
    "its own key in jwk": with_key(jwk=MALLORY.jwk),
    "its own short key in jwk": SHORT_MALLORY.token(claims(), {"jwk": SHORT_MALLORY.jwk}),
    "its own key in jwk, without an id": Signer("RS256", None, name="mallory").token(claims(), {"jwk": MALLORY.jwk}),
    "its own key at jku": with_key(jku="https://mallory.example/jwks.json"),
    "its own certificate in x5c": with_key(x5c=["MIIB"]),
    "its own certificate at x5u": with_key(x5u="https://mallory.example/cert.pem"),
    "a file as an id": RSA.token(claims(), {"kid": "../../../../etc/passwd"}),
    "an empty file as an id": hs256({"alg": "HS256", "kid": "/dev/null"}, b""),
    "an address as an id": RSA.token(claims(), {"kid": "https://mallory.example/jwks.json"}),
    "a query as an id": RSA.token(claims(), {"kid": "rsa' OR '1'='1"}),
    "a command as an id": RSA.token(claims(), {"kid": "|touch /tmp/taken"}),
    "an empty id": RSA.token(claims(), {"kid": ""}),
    "an id of a megabyte": RSA.token(claims(), {"kid": "x" * 1_000_000}),
    "an id of 15 kB": RSA.token(claims(), {"kid": "x" * 11_000}),
    "a number as an id": RSA.token(claims(), {"kid": 1}),
    "a list as an id": RSA.token(claims(), {"kid": ["rsa"]}),
    "nothing as an id": RSA.token(claims(), {"kid": None}),
    "a list as algorithm": RSA.token(claims(), {"alg": ["RS256"]}),
    "a number as algorithm": RSA.token(claims(), {"alg": 256}),
    "no algorithm in the header": RSA.token(claims(), b'{"kid": "rsa"}'),
    "crit that is known": RSA.token(claims(), {"crit": ["alg"]}),
    "crit that is not": RSA.token(claims(), {"crit": ["exp"], "exp": NOW + 600}),
    "crit that is empty": RSA.token(claims(), {"crit": []}),
    "crit that is text": RSA.token(claims(), {"crit": "b64"}),
    "b64": RSA.token(claims(), {"b64": False, "crit": ["b64"]}),
    "b64 without crit": RSA.token(claims(), {"b64": False}),
    "the algorithm twice": RSA.token(claims(), b'{"alg": "none", "kid": "rsa", "alg": "RS256"}'),
    "the id twice": RSA.token(claims(), b'{"alg": "RS256", "kid": "mallory", "kid": "rsa"}'),
    "the subject twice": raw(json.dumps(claims())[:-1] + ', "sub": "globex"}'),
    "the subject twice, once in escapes": raw(json.dumps(claims())[:-1] + ', "\\u0073ub": "globex"}'),
    "the audience twice": raw(json.dumps(claims(aud="other"))[:-1] + ', "aud": "lora-sidecar"}'),
    "another audience": RSA.token(claims(aud="other")),
    "a part of the audience": RSA.token(claims(aud="lora")),
    "other audiences": RSA.token(claims(aud=["other", "lora-sidecar-2"])),
    "no audience": RSA.token(claims(aud=None)),
    "an empty list of audiences": RSA.token(claims(aud=[])),
    "an audience in an object": RSA.token(claims(aud={"lora-sidecar": 1})),
    "an audience beside a number": RSA.token(claims(aud=["lora-sidecar", 1])),
    "another issuer": RSA.token(claims(iss="https://mallory.example")),
    "the issuer with a slash": RSA.token(claims(iss=NAME + "/")),
    "the issuer in other letters": RSA.token(claims(iss=NAME.upper())),
    "the issuer in a list": RSA.token(claims(iss=[NAME])),
    "no issuer": RSA.token(claims(iss=None)),
    "expired": RSA.token(claims(exp=NOW - 3600)),
    "not yet valid": RSA.token(claims(nbf=NOW + 3600)),
    "issued in the future": RSA.token(claims(iat=NOW + 3600)),
    "without an end": RSA.token(claims(exp=None)),
    "not before null": raw(json.dumps(claims())[:-1] + ', "nbf": null}'),
    **{
        f"its end is {text[:20]}": raw(json.dumps(claims(exp=None))[:-1] + f', "exp": {text}}}')
        for text in (
            '"1900000000"', "true", "null", "NaN", "Infinity", "-Infinity", "1e400", "-1", "0", "[1900000000]", "{}",
            "1e18", "9" * 400, "9" * 5000, "1900000000000",
        )
    },
    "not before a text": RSA.token(claims(nbf="1")),
    "not before never": raw(json.dumps(claims())[:-1] + ', "nbf": 1e400}'),
    "not before NaN": raw(json.dumps(claims())[:-1] + ', "nbf": NaN}'),
    "issued at a text": RSA.token(claims(iat="1")),
    "a token in a token": raw(json.dumps(RSA.token(claims()))),
    "a token as claims": RSA.token(RSA.token(claims()).encode(), {"cty": "JWT"}),
    "encrypted": ".".join((base64url(b'{"alg":"RSA-OAEP","enc":"A256GCM","kid":"rsa"}'), *["AAAA"] * 4)),
    "as JSON": json.dumps({"protected": HEADER, "payload": CLAIMS, "signature": SIGNATURE}),
    "claims in a list": raw(json.dumps([claims()])),
    "claims nested deeply": raw('{"a":' * 1800 + "1" + "}" * 1800),
    "claims with half a letter": raw(json.dumps(claims())[:-1] + ', "x": "\\ud800"}'),
    "claims that are not UTF-8": RSA.token(b'{"sub": "\xff"}'),
    "an honest token with a key in it that has a stranger's signature": f"{WITH_KEY}.{SIGNATURE}",
    "a header that is a text": RSA.token(claims(), b'"alg b64"'),
    "a header that is a list": RSA.token(claims(), b'["alg"]'),
    "a header that is a number": RSA.token(claims(), b"1"),
    "padded": f"{HEADER}.{CLAIMS}.{SIGNATURE}==",
    "in the other alphabet": f"{HEADER}.{CLAIMS}.{SIGNATURE[:-2]}+/",
    "another last letter of the same bytes": RSA.token(claims())[:-1] + chr(ord(SIGNATURE[-1]) + 1),
    "a line end": RSA.token(claims()) + "\n",
    "a blank before it": " " + RSA.token(claims()),
    "nothing": "",
    "dots": "..",
    "not ASCII": HEADER + "." + CLAIMS + "." + SIGNATURE[:-1] + "Ａ",
    "half a letter": "\ud800" + RSA.token(claims()),
    "a megabyte": "x" * 1_000_000,
    "a megabyte of dots": "." * 1_000_000,
    **{
        f"a tenant that is {what}": RSA.token(claims(sub=sub))
        for what, sub in {
            "empty": "", "blank": " ", "null": None, "a number": 1, "a list": ["acme"], "an object": {"acme": 1},
            "with a line end": "acme\n", "with a reversal": "acme\u202egnp.exe", "with a NUL": "acme\x00",
            "without a width": "ac\u200bme", "with a tag": "acme\U000e0041", "with a blank": "acme ",
            "not decoded": "acme\ufffd", "with another blank": "acme\u00a0x", "long": "a" * 513,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
async def test_a_forged_token_is_refused(tmp_path: Path, name: str) -> None:
    shared = {"kty": "oct", "kid": "shared", "k": base64url(b"0" * 32)}
    async with house(tmp_path, RSA, EC, beside=(shared,)) as made:
        assert (await made.tokens.verify(RSA.token(claims()))).tenant == "acme"
        assert (await made.tokens.verify(EC.token(claims()))).tenant == "acme"
        await made.refused(FORGED[name])


@pytest.mark.parametrize(
    "sub",
    [
        "system:serviceaccount:acme:client:x",
        "system:serviceaccount:acme/x:client",
        "system:serviceaccount::client",
        "system:serviceaccount: acme:client",
        "system:serviceaccount:acme :client",
        "xsystem:serviceaccount:acme:client",
        "system:serviceaccount:acme:client\n",
        "system:serviceaccount:ac\nme:client",
        "system:serviceaccount:acme\u202e:client",
        "system：serviceaccount：acme：client",
        "acme",
    ],
)
async def test_a_name_beside_the_pattern_has_no_tenant(tmp_path: Path, sub: str) -> None:
    async with house(tmp_path, RSA, tenant_pattern="system:serviceaccount:{tenant}:*") as made:
        assert (await made.tokens.verify(RSA.token(claims(sub="system:serviceaccount:acme:client")))).tenant == "acme"
        await made.refused(RSA.token(claims(sub=sub)))


async def test_tenants_that_look_alike_are_not_one(tmp_path: Path) -> None:
    """Letters are compared as they are: a name that another alphabet spells is another tenant, or none."""
    async with house(tmp_path, RSA) as made:
        alike = ("acme", "аcme", "ＡＣＭＥ", "ACME", "acmé", "acme\u0301")
        assert len({(await made.tokens.verify(RSA.token(claims(sub=sub)))).tenant for sub in alike}) == len(alike)


async def test_a_key_of_one_issuer_proves_nothing_of_another(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    async with house(tmp_path, RSA) as made, house(other, MALLORY, issuer="https://mallory.example") as beside:
        honest = RSA.token(claims())
        assert await made.tokens.verify(honest)
        await beside.refused(honest)
        await made.refused(MALLORY.token(claims()))
        await beside.refused(MALLORY.token(claims()))
        assert await beside.tokens.verify(MALLORY.token(claims(iss="https://mallory.example")))


async def verified(made: House, token: str) -> Principal | None:
    """Return whom a token names, or None if it is refused; nothing else may come."""
    try:
        return await made.tokens.verify(token)
    except Misused as error:
        if error.reason is not Reason.UNAUTHENTICATED:
            raise
        return None


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
async def test_whatever_is_changed_in_a_token_only_one_error_comes(tmp_path: Path, data: st.DataObject) -> None:
    """Letters of an honest token are replaced, cut or doubled."""
    honest = EC.token(claims())
    at = data.draw(st.integers(0, len(honest)))
    end = data.draw(st.integers(at, min(len(honest), at + 8)))
    forged = honest[:at] + data.draw(st.text(max_size=8)) + honest[end:]
    async with house(tmp_path, EC) as made:
        found = await verified(made, forged)
        assert (found is not None) == (forged == honest)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "jti", "groups", "plan"]),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text()
            | st.sampled_from([NAME, "lora-sidecar"]),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=5,
        ),
    )
)
async def test_whatever_an_issuer_signs_only_one_error_comes(tmp_path: Path, changed: dict[str, Any]) -> None:
    async with house(tmp_path, EC, groups="groups", class_claim="plan") as made:
        found = await verified(made, EC.token(claims() | {"plan": "gold"} | changed))
    if found is not None:
        assert found.tenant == changed.get("sub", "acme") != ""
        assert all(isinstance(word, str) for word in (found.tenant, *found.groups, found.klass))
