"""From what a call presents to the principal that it proves: the chain of credentials, the first that applies.

Read `x-forwarded-client-cert`, in which Envoy, the proxy of Istio, tells whose certificate it has verified.

    elements divided by commas   one for each proxy that the request passed, the nearest one last
    pairs divided by semicolons  By, Hash, Cert, Chain, Subject, URI, DNS; URI and DNS may be there several times
    "values in quotes"           where a backslash belongs to the letter after it, so that \" does not end the value

**Only the last element counts.** The proxy beside this process wrote it about the peer whose certificate it verified,
in each of Envoy's modes that write the header: Istio's sidecars append (APPEND_FORWARD), others replace (SANITIZE_SET).
What precedes it came with the request, from a gateway or from a client that made it up. So whoever calls through a
gateway has the gateway's identity here, and needs a token or a key of its own.

The whole header is parsed nevertheless, and refused unless all of it is well-formed: an open quote sent by a client
would otherwise swallow the element that is appended to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from cryptography.x509 import Name
from cryptography.x509.oid import NameOID

from sidecar.access.certificates import names_of, principal_of
from sidecar.access.external import ExternalCheck
from sidecar.access.keys import PREFIX, KeyBook
from sidecar.access.principal import Presented, Principal, Proof, Purpose
from sidecar.access.tokens import Tokens
from sidecar.config.identities import is_reserved
from sidecar.config.identity import Identity
from sidecar.errors import Misused, Reason

_KEYS = frozenset(("by", "hash", "cert", "chain", "subject", "uri", "dns"))
_PAIR = re.compile(r'([A-Za-z]+)=(?:"((?:[^"\\]|\\.)*)"|([^",;\\ ]*))(;| *, *|\Z)')
_HASH = re.compile(r"[0-9a-f]{64}")
_ATTRIBUTES = {"emailAddress": NameOID.EMAIL_ADDRESS, "serialNumber": NameOID.SERIAL_NUMBER, "SN": NameOID.SURNAME}
"""The names of BoringSSL for attributes that are not in RFC 4514."""

Pair = tuple[str, str]


def names_in(headers: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the nearest proxy's peer, as `certificates.names_of` has them; () if it has none.

    Raises Misused(UNAUTHENTICATED) for a header that is not well-formed, and for more than one.
    """
    if len(headers) != 1:
        raise _refused(f"there are {len(headers)} of them")
    last = elements_of(headers[0])[-1]
    found: dict[str, list[str]] = {}
    for key, value in last:
        found.setdefault(key, []).append(value)
    # Envoy never leaves out the digest. It does not quote names of the certificate, so a name with a comma or a
    # semicolon would look like more pairs or another element: one without a digest, or with a second URI.
    digests, subjects, uris = (found.get(key, []) for key in ("hash", "subject", "uri"))
    if len(digests) != 1 or not _HASH.fullmatch(digests[0]):
        raise _refused("its last element has no Hash of SHA-256")
    if len(subjects) > 1 or (len(uris) > 1 and "" in uris):
        raise _refused("its last element has two subjects, or an empty URI beside another")
    alternative = [value for key, value in last if key in ("uri", "dns") and value]
    if any('"' in name or "\\" in name for name in alternative):
        raise _refused("a name in it has a quote or a backslash")
    # Envoy writes the subject as RFC 2253 has it and adds no escapes of its own, so those in it are the subject's.
    return names_of(alternative, () if alternative else _common_names(*subjects))


def elements_of(header: str) -> list[list[Pair]]:
    """Return the elements of a header, each with its pairs: the key in small letters, and the value without its quotes
    but with its backslashes. Raises Misused(UNAUTHENTICATED).
    """
    if not header.isascii() or not header.isprintable():
        raise _refused("it has a letter that is not printable ASCII")
    elements: list[list[Pair]] = [[]]
    at, divider = 0, ""
    while at < len(header) or divider != "":
        pair = _PAIR.match(header, at)
        if pair is None or pair[1].lower() not in _KEYS:
            raise _refused(f"at {at} there is no pair of a known key and a value")
        elements[-1].append((pair[1].lower(), pair[3] if pair[2] is None else pair[2]))
        at, divider = pair.end(), pair[4]
        if "," in divider:
            elements.append([])
    if not elements[-1]:
        raise _refused("it is empty")
    return elements


@lru_cache(maxsize=1024)  # 50 µs each, and there are as many as certificates
def _common_names(subject: str = "") -> tuple[str, ...]:
    try:
        name = Name.from_rfc4514_string(subject, _ATTRIBUTES)
    except ValueError:
        raise _refused("its subject cannot be read") from None
    return tuple(str(attribute.value) for attribute in name.get_attributes_for_oid(NameOID.COMMON_NAME))


def _refused(what: str) -> Misused:
    return Misused(Reason.UNAUTHENTICATED, f"the header x-forwarded-client-cert is refused: {what}")


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
