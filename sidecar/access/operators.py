"""Who calls the admin listener: an operator with a token of the token file, or whom identity proves.

A listener on loopback, a Unix socket or with client certificates needs no token: who reaches it is an operator. With
`identity.mode: enforce` that holds for processes of this machine only, and only where `identity.local_admin` allows it.
"""

from __future__ import annotations

import hmac
from dataclasses import replace
from pathlib import Path

from sidecar.access.access import Access, Caller
from sidecar.access.principal import INFERENCE, OPERATOR, Presented, Principal, Proof, Purpose
from sidecar.errors import Misused, Reason
from sidecar.files import read_regular_or_piped

SCHEME = "Bearer "
_WAY = 'as metadata "authorization: Bearer <token>" (the option --token-file of the command line sends it)'


def read_tokens(path: Path) -> tuple[str, ...]:
    """Return the tokens of a file, one a line; several lines let a token and its successor both be valid for a while.

    Raises Misused(CONFIG_INVALID) when the file cannot be read or holds none.
    """
    try:
        text = read_regular_or_piped(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise Misused(Reason.CONFIG_INVALID, f"token file {path}: {_why(error)}") from error
    tokens = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not tokens:
        raise Misused(Reason.CONFIG_INVALID, f"token file {path} is empty; put a token on its first line")
    return tokens


def _why(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not text"


class Operators:
    """Identifies the callers of one admin listener. Comparing takes equally long for wrong and right tokens."""

    def __init__(self, access: Access, token_file: Path | None, local_admin: bool = True) -> None:
        self._access = access
        self._tokens = [] if token_file is None else [token.encode() for token in read_tokens(token_file)]
        self._local_admin = local_admin

    async def identify(self, presented: Presented, purpose: Purpose = INFERENCE) -> Caller:
        """Return the sender of a call. Raises Misused(UNAUTHENTICATED)."""
        given = presented.authorization
        if len(given) == 1 and self._admits(given[0]):  # with two, a proxy may have checked the other one
            return _proven(Principal(proof=Proof.TOKEN_FILE, roles=(OPERATOR,)), presented)
        if self._access.mode == "enforce":
            return await self._prove(presented, purpose)
        if self._tokens:
            wrong = "the token sent is not one of this listener's token file; it wants one of them,"
            why = wrong if given else "this listener wants a token of its token file,"
            raise Misused(Reason.UNAUTHENTICATED, f"{why} {_WAY}")
        name = presented.certificate[0] if presented.certificate else ""
        proof = Proof.CERTIFICATE if name else Proof.LOCAL
        caller = Caller(Principal(proof=proof, subject=name, roles=(OPERATOR,)), presented.peer)
        if self._access.mode == "observe":
            seen = await self._prove(presented, purpose)
            caller = replace(caller, proven=seen.proven, doubt=seen.doubt)
        return caller

    async def _prove(self, presented: Presented, purpose: Purpose) -> Caller:
        """Return whom identity proves. It takes the credential of a process of this machine before its place."""
        if presented.is_local and self._local_admin and not (presented.authorization or presented.forwarded):
            return _proven(Principal(proof=Proof.LOCAL, roles=(OPERATOR,)), presented)
        return await self._access.identify(presented, purpose)

    def _admits(self, given: str) -> bool:
        if not given.startswith(SCHEME):
            return False
        presented = given.removeprefix(SCHEME).strip().encode()
        matches = [hmac.compare_digest(presented, token) for token in self._tokens]  # all, so that time tells nothing
        return any(matches)


def _proven(principal: Principal, presented: Presented) -> Caller:
    return Caller(principal, presented.peer, proven=principal)
