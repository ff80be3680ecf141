"""Serve an ASGI application in this process's event loop: uvicorn's server with bounded connections.

The process handles signals itself: it drains before it stops a listener.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn

from sidecar.errors import Misused, Reason
from sidecar.fronts.http.connection import Connection, HttpLimits
from sidecar.tasks import ended

KEEP_ALIVE_S = 75
"""Idle time between requests. Longer than the minute for which load balancers reuse connections."""
CLOSE_S_MAX = 1.0


class HttpListener:
    """Serve an ASGI application on one address until it is stopped."""

    def __init__(self, app: Any, limits: HttpLimits, tls: ssl.SSLContext | None = None) -> None:
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_protocol(limits),
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                ssl_context_factory=None if tls is None else lambda config, default: tls,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def open(self, address: str, name: str) -> str:
        """Listen at HOST:PORT and return that address, with the port that was taken for 0.

        Raises Misused(PORT_IN_USE) naming the address and the setting `listeners.{name}.address`.
        """
        host, _, port = address.rpartition(":")
        try:
            taken = await self.start(host.strip("[]"), int(port))
        except (OSError, ValueError, OverflowError) as error:
            raise Misused(
                Reason.PORT_IN_USE,
                f"the {name} listener cannot have {address} ({error}): another process has the port, or the address "
                f"is not this machine's; choose another with listeners.{name}.address",
            ) from error
        return f"{host}:{taken}"

    async def start(self, host: str, port: int) -> int:
        """Listen and return the port. Raises OSError if the address cannot be bound."""
        listening = _bound(host, port)
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0)
        if self._task.done():
            await self._task
        return int(listening.getsockname()[1])

    async def stop(self) -> None:
        """Stop listening, cancel what is being answered, and close every connection."""
        if self._task is None:
            return
        self._server.should_exit = self._server.force_exit = True
        state = self._server.server_state
        await ended(*state.tasks)
        for connection in list(state.connections):
            connection.transport.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S_MAX):
                while state.connections:
                    await asyncio.sleep(0.005)
        for connection in list(state.connections):
            connection.transport.abort()
        await self._task
        self._task = None


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if host and family == socket.AF_INET:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    # With the protocol named asyncio turns off Nagle's algorithm, which would delay an answer's body behind its head.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    bound.setblocking(False)
    return bound


def _protocol(limits: HttpLimits) -> type[asyncio.Protocol]:
    """Return a connection class with these limits: uvicorn makes connections by class."""
    return type("Connection", (Connection,), {"limits": limits, "without_answer": ({}, {})})
