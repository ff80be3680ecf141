"""Tokens made by hand: RFC 7515 by `cryptography` alone, so that what is verified was not made by what verifies."""

from __future__ import annotations

import base64
import json
from functools import cache
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils

HASHES: dict[str, Any] = {"256": hashes.SHA256, "384": hashes.SHA384, "512": hashes.SHA512}
CURVES: dict[str, tuple[Any, str, int]] = {
    "ES256": (ec.SECP256R1(), "P-256", 32),
    "ES384": (ec.SECP384R1(), "P-384", 48),
    "ES512": (ec.SECP521R1(), "P-521", 66),
}
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", *CURVES, "EdDSA")


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int, length: int | None = None) -> str:
    return base64url(value.to_bytes(length or (value.bit_length() + 7) // 8, "big"))


def unsigned(header: dict[str, Any] | bytes, claims: dict[str, Any] | bytes) -> str:
    """Return the first two parts of a token; bytes are taken as they are."""
    parts = (part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims))
    return ".".join(map(base64url, parts))


@cache
def _private(algorithm: str, name: str) -> Any:
    """Return a key; the same for the same name, because an RSA key takes a tenth of a second."""
    if algorithm in CURVES:
        return ec.generate_private_key(CURVES[algorithm][0])
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    return rsa.generate_private_key(65537, 2048)


class Signer:
    """A private key of an algorithm. `kid` None leaves the id out of the JWK and of headers."""

    def __init__(self, algorithm: str = "ES256", kid: str | None = "one", name: str = "") -> None:
        self.algorithm = algorithm
        self.kid = kid
        self.private = _private(algorithm if algorithm in CURVES or algorithm == "EdDSA" else "RSA", name or str(kid))

    @property
    def jwk(self) -> dict[str, Any]:
        """The public key."""
        numbers: Any = None if self.algorithm == "EdDSA" else self.private.public_key().public_numbers()
        if self.algorithm == "EdDSA":
            raw = self.private.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
            found = {"kty": "OKP", "crv": "Ed25519", "x": base64url(raw)}
        elif self.algorithm in CURVES:
            _, curve, length = CURVES[self.algorithm]
            found = {"kty": "EC", "crv": curve, "x": number(numbers.x, length), "y": number(numbers.y, length)}
        else:
            found = {"kty": "RSA", "n": number(numbers.n), "e": number(numbers.e)}
        return found if self.kid is None else found | {"kid": self.kid}

    def signature(self, text: str) -> bytes:
        data = text.encode()
        if self.algorithm == "EdDSA":
            return bytes(self.private.sign(data))
        digest = HASHES[self.algorithm[2:]]()
        if self.algorithm in CURVES:
            length = CURVES[self.algorithm][2]
            r, s = utils.decode_dss_signature(self.private.sign(data, ec.ECDSA(digest)))
            return r.to_bytes(length, "big") + s.to_bytes(length, "big")
        pad: Any = padding.PKCS1v15()
        if self.algorithm.startswith("PS"):
            pad = padding.PSS(padding.MGF1(digest), digest.digest_size)
        return bytes(self.private.sign(data, pad, digest))

    def token(self, claims: dict[str, Any] | bytes, header: dict[str, Any] | bytes | None = None) -> str:
        """Return a token; `header` replaces what stands in the usual one, or the whole if it is bytes."""
        usual = {"alg": self.algorithm, "typ": "JWT"} | ({} if self.kid is None else {"kid": self.kid})
        text = unsigned(header if isinstance(header, bytes) else usual | (header or {}), claims)
        return f"{text}.{base64url(self.signature(text))}"


def jwks_of(*signers: Signer, beside: tuple[Any, ...] = ()) -> bytes:
    """Return the JWKS of signers; `beside` are other entries, which come first."""
    return json.dumps({"keys": [*beside, *(signer.jwk for signer in signers)]}).encode()
