"""Authenticate calls on the admin listener by `authorization: Bearer <token>`."""

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
    """Return the tokens of a file, one a line; several lines let a token and its successor both be valid for a while.

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
    """Admit calls that carry a token of the file. Comparison takes equally long for wrong and right tokens."""

    def __init__(self, path: Path) -> None:
        self._tokens = [token.encode() for token in read_tokens(path)]

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        given = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        if len(given) == 1 and self._admits(given[0]):  # with two, a proxy may have checked the other one
            return await continuation(details)
        # Stream to stream: the refusal waits for no message.
        return grpc.stream_stream_rpc_method_handler(_refuse_wrong if given else _refuse_none)

    def _admits(self, given: Any) -> bool:
        if not isinstance(given, str) or not given.startswith(SCHEME):
            return False
        presented = given.removeprefix(SCHEME).strip().encode()
        matches = [hmac.compare_digest(presented, token) for token in self._tokens]
        return any(matches)


async def _refuse_none(requests: Any, context: Any) -> None:
    await _refuse(context, "this listener wants a token of its token file,")


async def _refuse_wrong(requests: Any, context: Any) -> None:
    await _refuse(context, "the token sent is not one of this listener's token file; it wants one of them,")


async def _refuse(context: Any, why: str) -> None:
    way = 'as metadata "authorization: Bearer <token>" (the option --token-file of the command line sends it)'
    await abort(context, Misused(Reason.UNAUTHENTICATED, f"{why} {way}"))
