"""Questions that end a server, as its source says: one at a time, and only when they are asked for by name.

Each begins a stream of the base model, does the deed, and notes what becomes of who asked, of the stream, of who comes
later, and of the server's health. A server must be started anew afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from tools.record.forms import said
from tools.record.server import Server

Deed = Callable[[Server], Awaitable[str]]
GOES_ON, SILENT, BROKEN, ENDED, HANGS = "goes on", "is silent", "is broken", "has ended", "hangs"
_MOST_TOKENS = 100_000
_ILL, _GONE = "503", "is not let in"


async def rank(server: Server) -> str:
    """An adapter of too high a rank."""
    return await _asked(server, server.body(server.copies.of_rank(server.max_rank + 1)))


async def layer(server: Server) -> str:
    """An adapter with a layer that the model has not got."""
    return await _asked(server, server.body(server.copies.of_layer(999)))


async def size(server: Server) -> str:
    """An adapter whose matrices are too short."""
    return await _asked(server, server.body(server.copies.too_short()))


async def slots(server: Server) -> str:
    """One more adapter in a batch than max_loras."""
    bodies = [server.body(server.copies.plain()) | {"max_tokens": 500} for _ in range(server.slots + 1)]
    answers = await asyncio.gather(*(_asked(server, body) for body in bodies))
    return ", ".join(sorted(set(answers)))


async def load(server: Server) -> str:
    """An adapter without files, which ends a server of 1.2."""
    return await _asked(server, server.body(server.copies.without_config()))


DEEDS: dict[str, Deed] = {"rank": rank, "layer": layer, "size": size, "slots": slots, "load": load}


async def what_becomes_of(server: Server, deed: Deed) -> Any:
    """Return what is seen of a deed."""
    running = _Running(server)
    await running.begin()
    asked = await deed(server)
    return {
        "who asks": asked,
        "the stream": await running.state(),
        "who comes later": await _asked(server, server.body()),
        "health": await _healths(server),
    }


class _Running:
    """A long stream of the base model."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._events = 0
        self._begun = asyncio.Event()

    async def begin(self) -> None:
        """Return when its first event has come."""
        self._task = asyncio.create_task(self._listen())
        async with asyncio.timeout(60):
            await self._begun.wait()

    async def state(self) -> str:
        """Return what has become of it: what it does within the server's patience."""
        if self._task.done():
            return self._task.result()
        before = self._events
        await asyncio.wait([self._task], timeout=self._server.patience_s)
        if self._task.done():
            return self._task.result()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        return GOES_ON if self._events > before else SILENT

    async def _listen(self) -> str:
        body = self._server.body() | {"stream": True, "max_tokens": _MOST_TOKENS, "ignore_eos": True}
        last = ""
        try:
            async with (
                httpx.AsyncClient(base_url=self._server.url, timeout=None) as http,
                http.stream("POST", "/v1/completions", json=body) as answer,
            ):
                async for line in answer.aiter_lines():
                    self._events += bool(line)
                    last = line or last
                    self._begun.set()
        except httpx.TransportError:
            return BROKEN
        return f"{ENDED} with {said(last)[:80]}" if "[DONE]" not in last else ENDED


async def _asked(server: Server, body: dict[str, Any]) -> str:
    """Return what becomes of a request within the server's patience."""
    try:
        answer = await server.post("/v1/completions", body, server.patience_s)
    except httpx.TimeoutException:
        return HANGS
    except httpx.TransportError as error:
        return _GONE if isinstance(error, httpx.ConnectError) else BROKEN
    text = answer.text if answer.status_code != httpx.codes.OK else ""
    return f"{answer.status_code} {said(text)}".strip()


async def _healths(server: Server) -> list[str]:
    """Return whether the server ever called itself ill, and the last state of its health, within its patience.

    Before it has ended, other states tell nothing but how quick one asked.
    """
    states = [await _health(server)]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(server.patience_s):
            while states[-1] != _GONE:
                await asyncio.sleep(0.1)
                states.append(await _health(server))
    return [*dict.fromkeys(state for state in states[:-1] if state == _ILL and state != states[-1]), states[-1]]


async def _health(server: Server) -> str:
    try:
        async with httpx.AsyncClient(timeout=server.patience_s) as http:
            return str((await http.get(f"{server.url}/health")).status_code)
    except httpx.ConnectError:
        return _GONE
    except httpx.TransportError:
        return BROKEN
