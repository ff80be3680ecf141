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
        if self._admits(details.invocation_metadata or ()):
            return await continuation(details)
        return grpc.stream_stream_rpc_method_handler(_turn_away)  # a stream: it waits for no message

    def _admits(self, metadata: Any) -> bool:
        given = next((value for key, value in metadata if key == "authorization"), "")
        if not isinstance(given, str) or not given.startswith(SCHEME):
            return False
        presented = given.removeprefix(SCHEME).strip().encode()
        matches = [hmac.compare_digest(presented, token) for token in self._tokens]
        return any(matches)


async def _turn_away(requests: Any, context: Any) -> None:
    await abort(
        context,
        Misused(
            Reason.UNAUTHENTICATED,
            'this listener wants the token of its token file, as metadata "authorization: Bearer <token>" '
            "(the option --token-file of the command line sends it)",
        ),
    )
