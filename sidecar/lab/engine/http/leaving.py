"""Answers to clients that may leave before the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from sidecar.tasks import ended

Answer = TypeVar("Answer")
LEFT = Response(status_code=499)
"""A response that no client reads."""


class Streamed(StreamingResponse):
    """A stream that is closed at once when its client leaves.

    The library's own way waits for a moment in which the stream has nothing to send; an engine without simulated time
    has none.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_left(receive, self.stream_response(send))

    async def stream_response(self, send: Send) -> None:
        stream = self.body_iterator
        assert isinstance(stream, AsyncGenerator)
        async with aclosing(stream):
            await super().stream_response(send)


async def unless_left(receive: Receive, answering: Coroutine[Any, Any, Answer]) -> Answer | None:
    """Return the result of an answer; None if its client left before."""
    tasks = answer, _ = asyncio.create_task(answering), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        is_over = answer.done()
        await ended(*tasks)  # the result of an answer that no client waits for is ignored
    return answer.result() if is_over else None


async def _left(receive: Receive) -> None:
    """Return when the client has left; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
