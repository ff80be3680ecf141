"""An issuer of the tests, whose keys are in a file."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kit.jwts import Signer, jwks_of

ISSUER, AUDIENCE = "https://issuer.example", "lora-sidecar"


@dataclass
class TokenMaker:
    """An issuer with one key, whose public half is in a JWKS file below `folder`."""

    folder: Path
    signer: Signer = field(default_factory=Signer)

    def __post_init__(self) -> None:
        self.jwks.write_bytes(jwks_of(self.signer))

    @property
    def jwks(self) -> Path:
        return self.folder / "jwks.json"

    @property
    def entry(self) -> dict[str, Any]:
        """The issuer's entry in `identity.issuers`."""
        names = {"tenant": "tenant", "groups": "groups"}
        return {"issuer": ISSUER, "audience": AUDIENCE, "jwks": str(self.jwks)} | names

    def token(self, tenant: str, for_s: float = 600, **claims: Any) -> str:
        now = time.time()
        body = {"iss": ISSUER, "aud": AUDIENCE, "sub": f"somebody of {tenant}", "tenant": tenant}
        return self.signer.token(body | {"iat": now, "exp": now + for_s} | claims)

    def bearer(self, tenant: str, **claims: Any) -> str:
        return f"Bearer {self.token(tenant, **claims)}"
