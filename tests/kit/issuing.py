"""An issuer of tokens, whose keys are in a file, and a verifier that trusts it, by a clock of the test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sidecar.access.tokens import Tokens
from sidecar.config.identity import Issuer
from sidecar.errors import Misused, Reason, Refused
from tests.kit.jwts import Signer, jwks_of

NOW = 1_800_000_000
NAME = "https://issuer.example"
AUDIENCE = "lora-sidecar"


class Clock:
    """Unix seconds, as the test sets them."""

    def __init__(self) -> None:
        self.now: float = NOW

    def __call__(self) -> float:
        return self.now


def claims(**changed: Any) -> dict[str, Any]:
    """Return the claims of a good token; those that are changed to None are left out."""
    usual = {"iss": NAME, "aud": AUDIENCE, "sub": "acme", "iat": NOW - 60, "exp": NOW + 600}
    return {name: value for name, value in (usual | changed).items() if value is not None}


class House:
    """A verifier with one issuer."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.clock = Clock()
        self.jwks = folder / "jwks.json"
        self.copies = folder / "access"
        self.issuer = Issuer(**{"issuer": NAME, "audience": AUDIENCE, "jwks": str(self.jwks)} | options)
        self.tokens = Tokens([self.issuer], self.copies, self.clock)

    def publish(self, *signers: Signer, beside: tuple[Any, ...] = ()) -> None:
        self.jwks.write_bytes(jwks_of(*signers, beside=beside))

    async def waits_for_keys(self, token: str) -> None:
        """Check that a token is refused for now only: whoever sends it again may succeed."""
        with pytest.raises(Refused, match="the keys of the token's issuer cannot be had at present") as caught:
            await self.tokens.verify(token)
        assert caught.value.reason.row.retryable

    async def refused(self, token: str, why: str = "^the token is refused: ") -> str:
        """Return why a token is refused, which nothing of the token stands in."""
        with pytest.raises(Misused, match=why) as caught:
            await self.tokens.verify(token)
        assert caught.value.reason is Reason.UNAUTHENTICATED
        message = caught.value.message
        assert len(message) < 500
        assert message.isprintable()
        assert not any(part and part in message for part in token.split(".") if len(part) > 8)
        return message


@asynccontextmanager
async def house(folder: Path, *signers: Signer, beside: tuple[Any, ...] = (), **options: Any) -> AsyncIterator[House]:
    """Run a verifier whose issuer publishes the keys of signers; `options` change the issuer's configuration."""
    made = House(folder, **options)
    made.publish(*signers, beside=beside)
    made.tokens.start()
    try:
        yield made
    finally:
        await made.tokens.stop()
