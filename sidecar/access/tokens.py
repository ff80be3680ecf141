"""Prove who calls by a token (JWT) of a configured issuer.

The order of the checks: size and shape, the issuer among the configured ones, the algorithm among the issuer's, the key
among the issuer's published ones, the signature, and only then what the token says. Of its header only `alg` and `kid`
are used; keys or addresses in it (`jwk`, `jku`, `x5c`, `x5u`) are never looked at, and a header with `crit` is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from time import time
from typing import Any

from joserfc import jws
from joserfc.errors import ExpiredTokenError, InvalidClaimError, JoseError, MissingClaimError, UnsupportedAlgorithmError
from joserfc.jws import JWSRegistry
from joserfc.jwt import JWTClaimsRegistry
from joserfc.util import urlsafe_b64decode

from sidecar.access.jwks import Fetch, Jwks, PublicKey, fetch_jwks
from sidecar.access.patterns import tenant_in
from sidecar.access.principal import TIME_MAX, Principal, Proof
from sidecar.adapters.strict_json import parse_object
from sidecar.config.identities import CLASS, TENANT, clipped, problem_of
from sidecar.config.identity import Issuer
from sidecar.errors import Misused, Reason, Refused

TOKEN_BYTES_MAX = 16 << 10
KEYS_TRIED_MAX = 4
"""How many keys of an issuer are tried for a token that names none: each costs 0.1 ms."""
KNOWN_S_MAX = 300.0
KNOWN_MAX = 10_000
KNOWN_BYTES_MAX = 16 << 20
"""The limits of the tokens that are known to be valid: for how long, how many, and how long all are together."""
TIMES = ("exp", "nbf", "iat")


@dataclass(frozen=True, slots=True)
class _Known:
    principal: Principal
    until: float
    key: PublicKey
    jwks: Jwks
    size_bytes: int


class _Verifier:
    """One issuer: its keys, and how its tokens are read."""

    def __init__(self, issuer: Issuer, jwks: Jwks, clock: Callable[[], float]) -> None:
        self.issuer = issuer
        self.jwks = jwks
        self.registry = _Registry(algorithms=issuer.algorithms, strict_check_header=False)
        self._claims = JWTClaimsRegistry(
            now=clock,  # type: ignore[arg-type]  # it only compares, and seconds have fractions
            leeway=issuer.leeway_s,  # type: ignore[arg-type]
            aud={"essential": True, "value": issuer.audience},
            exp={"essential": True},
            sub={"essential": True},
        )

    def principal_of(self, claims: dict[str, Any]) -> Principal:
        """Return whom the claims of a verified token name; it ends with the leeway. Raises Misused."""
        for name in TIMES:
            if isinstance(time := claims.get(name, 0), int | float) and not 0 <= time < TIME_MAX:
                raise _refused(f"its claim {name} is no time")
        try:
            self._claims.validate(claims)
        except ExpiredTokenError:
            raise _refused(f"it expired at {_shown(claims['exp'])}; get a new one from its issuer") from None
        except MissingClaimError as error:
            raise _refused(f"it has no claim {error.claim}") from None
        except InvalidClaimError as error:
            raise _refused(_what_is_wrong(error.claim, claims)) from None
        return Principal(
            tenant=self._tenant(claims),
            proof=Proof.TOKEN,
            subject=_word(claims, "sub"),
            groups=self._groups(claims),
            klass=self._class(claims),
            expires_at=claims["exp"] + self.issuer.leeway_s,
        )

    def _tenant(self, claims: dict[str, Any]) -> str:
        name = _word(claims, self.issuer.tenant)
        try:
            return tenant_in(name, self.issuer.tenant_pattern)
        except ValueError as error:
            raise _refused(f"its claim {self.issuer.tenant} {error}") from None

    def _groups(self, claims: dict[str, Any]) -> tuple[str, ...]:
        name = self.issuer.groups
        found = None if name is None else _claim(claims, name)
        groups = [found] if isinstance(found, str) else [] if found is None else found
        if not isinstance(groups, list) or not all(isinstance(group, str) for group in groups):
            raise _refused(f"its claim {name} is not a list of texts")
        # A group that cannot be read is not left out: a policy may forbid something to it.
        for group in groups:
            if problem := problem_of(TENANT, group):
                raise _refused(f"a group in its claim {name} {problem}")
        return tuple(groups)

    def _class(self, claims: dict[str, Any]) -> str:
        name = self.issuer.class_claim
        if name is None:
            return ""
        klass = _word(claims, name)
        if problem := problem_of(CLASS, klass):
            raise _refused(f"its claim {name} {problem}")
        return klass


class Tokens:
    """Verifies tokens. Each is verified once, and then known by its digest until it ends, five minutes have passed or
    its key is no longer published.

    `folder` takes copies of the issuers' keys. `clock` gives Unix seconds.
    """

    def __init__(
        self,
        issuers: Sequence[Issuer],
        folder: Path | None,
        clock: Callable[[], float] = time,
        fetch: Fetch = fetch_jwks,
    ) -> None:
        self._clock = clock
        self._verifiers = {each.issuer: _Verifier(each, Jwks(each, folder, clock, fetch), clock) for each in issuers}
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._known_bytes = 0

    def start(self) -> None:
        """Begin to fetch the issuers' keys; an issuer that is away is asked again."""
        for verifier in self._verifiers.values():
            verifier.jwks.start()

    async def stop(self) -> None:
        for verifier in self._verifiers.values():
            await verifier.jwks.stop()

    async def verify(self, token: str) -> Principal:
        """Return whom a token names. Raises Misused(UNAUTHENTICATED) that says what is wrong, without the token, and
        Refused(STATE_UNAVAILABLE) while the issuer's keys cannot be had.
        """
        if len(token) > TOKEN_BYTES_MAX or not token.isascii():
            raise _refused(f"it is longer than {TOKEN_BYTES_MAX} characters or not ASCII")
        raw = token.encode()
        digest = sha256(raw).digest()
        known = self._known.get(digest)
        if known is not None:
            if self._clock() < known.until and known.jwks.holds(known.key):
                self._known.move_to_end(digest)
                return known.principal
            self._forget(digest)
        verifier, key, claims = await self._verified(raw)
        principal = verifier.principal_of(claims)
        assert principal.expires_at is not None
        until = min(principal.expires_at, self._clock() + KNOWN_S_MAX)
        self._remember(digest, _Known(principal, until, key, verifier.jwks, len(raw)))
        return principal

    async def _verified(self, raw: bytes) -> tuple[_Verifier, PublicKey, dict[str, Any]]:
        """Return the issuer, the key and the claims of a token whose signature is right."""
        signed, claims = _read(raw)
        issuer = claims.get("iss")
        verifier = self._verifiers.get(issuer) if isinstance(issuer, str) else None
        if verifier is None:
            raise _refused("its issuer is not one that is trusted here; ask your operator which is")
        header, jwks = signed.protected, verifier.jwks
        algorithm, kid = header["alg"], header.get("kid")
        if algorithm not in verifier.issuer.algorithms:
            raise _refused(f"its algorithm {clipped(algorithm)} is not one that is accepted of its issuer")
        while True:
            keys = jwks.find(kid)
            fit = [key for key in keys if JWSRegistry.filter_algorithms(key.key, [algorithm])]
            for key in fit[:KEYS_TRIED_MAX]:
                if _is_signed(signed, key, verifier.registry):
                    return verifier, key, claims
            # A new key may have been published. One that is known by its id needs no look.
            if (keys and kid is not None) or not await jwks.renew():
                break
        if jwks.is_empty:
            raise Refused(
                Reason.STATE_UNAVAILABLE,
                "the keys of the token's issuer cannot be had at present; try again, or ask your operator",
            )
        if not fit:
            raise _refused("its issuer publishes no such key; get a new token, or ask your operator")
        raise _refused("its signature is invalid")

    def _remember(self, digest: bytes, known: _Known) -> None:
        self._forget(digest)  # two calls may have verified it at the same time
        self._known[digest] = known
        self._known_bytes += known.size_bytes
        while len(self._known) > KNOWN_MAX or self._known_bytes > KNOWN_BYTES_MAX:
            self._forget(next(iter(self._known)))

    def _forget(self, digest: bytes) -> None:
        known = self._known.pop(digest, None)
        if known is not None:
            self._known_bytes -= known.size_bytes


class _Registry(JWSRegistry):
    """The algorithms of one issuer. Unlike the library's it does not warn of EdDSA's old name at each token."""

    def get_alg(self, name: str) -> Any:
        if name not in (self.allowed or ()):
            raise UnsupportedAlgorithmError(name)
        return self.algorithms[name]


_READING = _Registry()
_READING.max_header_length = TOKEN_BYTES_MAX  # some issuers put their certificates there, which are not looked at


def _read(raw: bytes) -> tuple[jws.CompactSignature, dict[str, Any]]:
    """Take a token apart, nothing of which is verified. Raises Misused."""
    try:
        signed = jws.extract_compact(raw, registry=_READING)
    except (JoseError, ValueError, TypeError, RecursionError):  # the last: JSON that is nested too deeply
        raise _refused("it is not a signed JWT: three parts in base64url with dots between") from None
    # The library takes the last of two equal keys where others may take the first; this parser refuses them.
    header = _parsed("header", urlsafe_b64decode(signed.segments["header"]))
    claims = _parsed("payload", signed.payload)
    if "crit" in header or "b64" in header:
        raise _refused("its header has crit or b64, which are not supported")
    if not isinstance(header.get("alg"), str) or not isinstance(header.get("kid", ""), str):
        raise _refused("alg or kid in its header is not text")
    return signed, claims


def _parsed(part: str, text: bytes) -> dict[str, Any]:
    try:
        return parse_object(text)
    except ValueError as error:
        raise _refused(f"its {part} cannot be read: {error}") from None
    except RecursionError:
        raise _refused(f"its {part} cannot be read: it is nested too deeply") from None


def _is_signed(signed: jws.CompactSignature, key: PublicKey, registry: JWSRegistry) -> bool:
    try:
        return jws.validate_compact(signed, key.key, registry=registry)
    except (JoseError, ValueError, TypeError):
        return False  # a signature of another length, or a key that is not made for this


def _claim(claims: Any, path: str) -> Any:
    """Return a claim by its name, or by the names of objects with a dot between; None if there is none.

    Names have dots too (`kubernetes.io`). Raises Misused if a path can be read in two ways.
    """
    found = _claims_at(claims, path)
    if len(found) > 1:
        raise _refused(f"it has two claims that are called {path}")
    return found[0] if found else None


def _claims_at(claims: Any, path: str) -> list[Any]:
    if not isinstance(claims, dict):
        return []
    found = [claims[path]] if path in claims else []
    for at, letter in enumerate(path):
        if letter == "." and path[:at] in claims:
            found += _claims_at(claims[path[:at]], path[at + 1 :])
    return found


def _word(claims: dict[str, Any], name: str) -> str:
    word = _claim(claims, name)
    if not isinstance(word, str) or not word:
        raise _refused(f"it has no claim {name} with a text")
    if problem := problem_of(TENANT, word):
        raise _refused(f"its claim {name} {problem}")
    return word


def _what_is_wrong(claim: str, claims: dict[str, Any]) -> str:
    if claim == "aud":
        return "it is meant for another audience; ask its issuer for one with the audience of this service"
    value = claims[claim]
    if claim in TIMES and isinstance(value, int | float) and not isinstance(value, bool):
        return f"it is not valid before {_shown(value)}; compare the clocks"
    return f"its claim {claim} is malformed"


def _shown(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"


def _refused(what: str) -> Misused:
    return Misused(Reason.UNAUTHENTICATED, f"the token is refused: {what}")
