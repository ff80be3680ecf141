"""From what a call presents to the principal that it proves: the chain of credentials, the first that applies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sidecar.access.certificates import principal_of
from sidecar.access.external import ExternalCheck
from sidecar.access.forwarded import names_in
from sidecar.access.keys import PREFIX, KeyBook
from sidecar.access.principal import Presented, Principal, Proof, Purpose
from sidecar.access.tokens import Tokens
from sidecar.config.identities import is_reserved
from sidecar.config.identity import Identity
from sidecar.errors import Misused, Reason

_SCHEME = "bearer"
_WAY = 'send an API key or a token as "authorization: Bearer …"'


class Proving:
    """Proves who calls by certificate, API key, token, or what a mesh forwards, or by an external check that proves
    instead of them. What is None is not configured.
    """

    def __init__(
        self,
        identity: Identity,
        keys: KeyBook | None,
        tokens: Tokens | None,
        clock: Callable[[], float],
        external: ExternalCheck | None = None,
    ) -> None:
        self._external = external if external is not None and external.proves else None
        self._identity = identity
        self._keys = keys
        self._tokens = tokens
        self._clock = clock

    async def prove(self, presented: Presented, purpose: Purpose) -> Principal:
        """Return whom a call's credential proves. Raises Misused(UNAUTHENTICATED), or what the external check does."""
        if self._external is None:
            principal = await self._first(presented)
        else:
            principal = await self._external.prove(presented, purpose)
        if is_reserved(principal.tenant):
            raise _unauthenticated(f'the credential is of tenant "{principal.tenant}", which is the sidecar\'s own')
        return principal

    async def _first(self, presented: Presented) -> Principal:
        """Return the principal of the first credential that applies. One that applies and is faulty ends the search."""
        wanted = self._identity.certificates
        if wanted.enabled and presented.certificate:
            try:
                return principal_of(presented.certificate, wanted.tenant_pattern, Proof.CERTIFICATE)
            except Misused:
                if not presented.authorization:  # else it is an ingress's, which passes its client's credential on
                    raise
        if presented.authorization:
            return await self._of_authorization(presented.authorization)
        if wanted.forwarded is not None and presented.forwarded:
            return principal_of(names_in(presented.forwarded), wanted.tenant_pattern, Proof.FORWARDED)
        raise _unauthenticated(f"the call has no credential; {_WAY}")

    async def _of_authorization(self, values: Sequence[str]) -> Principal:
        if len(values) > 1:  # a proxy may have checked the other one
            raise _unauthenticated('the header "authorization" is given twice; send one')
        scheme, _, secret = values[0].partition(" ")
        if scheme.lower() != _SCHEME:
            raise _unauthenticated(f'the header "authorization" has another scheme than Bearer; {_WAY}')
        secret = secret.strip()
        if not secret:
            raise _unauthenticated(
                'the header "authorization" has nothing after Bearer; look whether the variable or the file with the '
                "key is empty"
            )
        if self._tokens is not None and not secret.startswith(PREFIX) and secret.count(".") >= 2:
            return await self._tokens.verify(secret)
        if self._keys is not None:
            return self._keys.find(secret, self._clock())
        raise _unauthenticated("this sidecar takes no API keys and the credential is no token of an issuer")

    def check(self, principal: Principal) -> None:
        """Raise Misused(UNAUTHENTICATED) if the credential has ended since it was proven."""
        now = self._clock()
        if principal.expires_at is not None and now >= principal.expires_at:
            raise _unauthenticated("the credential has expired; call again with a new one")
        if principal.proof is Proof.KEY and self._keys is not None:
            self._keys.check(principal, now)


def _unauthenticated(text: str) -> Misused:
    return Misused(Reason.UNAUTHENTICATED, text)
