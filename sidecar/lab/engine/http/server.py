"""An HTTP server in the event loop of another program, on a socket that is bound before it starts."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from sidecar.lab.engine.kserve.options import Options

_KEEP_ALIVE_S = 5
"""Both vLLM and trtllm-serve leave uvicorn's value."""


class HttpServer(uvicorn.Server):
    """A server that leaves signals alone."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def cut(self) -> None:
        """End at once, and close every connection, as the end of a process does."""
        self.should_exit = self.force_exit = True
        # uvicorn would listen until it looks at the flags.
        for listener in self.servers:
            listener.close()
        for connection in list(self.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport is not None:
                transport.abort()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close every connection, as the end of a process does.

        uvicorn closes the connections that are set up when the shutdown begins. A connection that was accepted just
        before is set up later; left open, it would answer for the dead engine for as long as its client keeps it.
        """
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def http_server(options: Options, app: ASGIApp) -> HttpServer:
    """Return a server of an application, with TLS if the options say so."""
    ca = options.tls_client_ca
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_S,
        ssl_certfile=options.tls_certificate,
        ssl_keyfile=options.tls_key,
        ssl_ca_certs=None if ca is None else str(ca),
        ssl_cert_reqs=ssl.CERT_NONE if ca is None else ssl.CERT_REQUIRED,
    )
    return HttpServer(config)
