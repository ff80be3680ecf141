"""The admin listener's token: calls carry `authorization: Bearer <token>`, or they are turned away."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from sidecar.errors import Misused, Reason
from sidecar.fronts.status import abort

SCHEME = "Bearer "


def read_tokens(path: Path) -> tuple[str, ...]:
    """Return the tokens of a file, one a line, so that an old one and its successor can both be good for a while.

    Raises Misused(CONFIG_INVALID) when the file cannot be read or holds none.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Misused(Reason.CONFIG_INVALID, f"token file {path}: {_why(error)}") from error
    tokens = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not tokens:
        raise Misused(Reason.CONFIG_INVALID, f"token file {path} is empty; put a token on its first line")
    return tokens


def _why(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not text"


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Lets calls through that carry a token of the file. Comparing takes as long for a wrong one as for a right one."""

    def __init__(self, path: Path) -> None:
        self._tokens = [token.encode() for token in read_tokens(path)]

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        given = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        if len(given) == 1 and self._admits(given[0]):  # of two, a proxy may have looked at the other one
            return await continuation(details)
        return grpc.stream_stream_rpc_method_handler(
            _refuse_wrong if given else _refuse_none
        )  # it waits for no message

    def _admits(self, given: Any) -> bool:
        if not isinstance(given, str) or not given.startswith(SCHEME):
            return False
        presented = given.removeprefix(SCHEME).strip().encode()
        matches = [hmac.compare_digest(presented, token) for token in self._tokens]
        return any(matches)


async def _refuse_none(requests: Any, context: Any) -> None:
    await _turn_away(context, "this listener wants a token of its token file,")


async def _refuse_wrong(requests: Any, context: Any) -> None:
    await _turn_away(context, "the token sent is not one of this listener's token file; it wants one of them,")


async def _turn_away(context: Any, why: str) -> None:
    way = 'as metadata "authorization: Bearer <token>" (the option --token-file of the command line sends it)'
    await abort(context, Misused(Reason.UNAUTHENTICATED, f"{why} {way}"))
