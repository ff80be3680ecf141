"""JWTs of an issuer of the tests, signed with plain primitives and not with the library that verifies them."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

ISSUER, AUDIENCE = "https://issuer.example", "lora-sidecar"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass
class TokenMaker:
    """An issuer with one ES256 key, whose public half is in a JWKS file below `folder`."""

    folder: Path
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        numbers = self.key.public_key().public_numbers()
        x, y = (b64(number.to_bytes(32, "big")) for number in (numbers.x, numbers.y))
        jwk = {"kty": "EC", "crv": "P-256", "kid": "one", "alg": "ES256", "use": "sig", "x": x, "y": y}
        self.jwks.write_text(json.dumps({"keys": [jwk]}))

    @property
    def jwks(self) -> Path:
        return self.folder / "jwks.json"

    @property
    def entry(self) -> dict[str, Any]:
        """The issuer's entry in `identity.issuers`."""
        return {
            "issuer": ISSUER,
            "audience": AUDIENCE,
            "jwks": str(self.jwks),
            "tenant": "tenant",
            "groups": "groups",
        }

    def token(self, tenant: str, for_s: float = 600, **claims: Any) -> str:
        now = time.time()
        body = {"iss": ISSUER, "aud": AUDIENCE, "sub": f"somebody of {tenant}", "tenant": tenant}
        return self.signed({"alg": "ES256", "kid": "one"}, body | {"iat": now, "exp": now + for_s} | claims)

    def signed(self, header: dict[str, Any], claims: dict[str, Any]) -> str:
        text = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(claims).encode())}"
        r, s = decode_dss_signature(self.key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{text}.{b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def bearer(self, tenant: str, **claims: Any) -> str:
        return f"Bearer {self.token(tenant, **claims)}"
