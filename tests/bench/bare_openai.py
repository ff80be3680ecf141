"""A relay of an OpenAI API that does nothing: httpx to the engine, starlette to the client. The reference of `openai`.

python -m tests.bench.bare_openai HOST:PORT [--uvloop]
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

PATHS = ("/v1/completions", "/v1/chat/completions")


class Relay:
    """Passes each request on to the engine, and what comes back to the client."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def pass_on(self, request: Request) -> Response:
        headers = {"content-type": "application/json"}
        asked = self._client.build_request("POST", request.url.path, content=await request.body(), headers=headers)
        reply = await self._client.send(asked, stream=True)

        async def pieces() -> Any:
            try:
                async for piece in reply.aiter_raw():
                    yield piece
            finally:
                await reply.aclose()

        return StreamingResponse(pieces(), reply.status_code, media_type=reply.headers["content-type"])


class Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Any:
        """Leave signals to `serve`."""
        yield


async def serve(engine: str) -> None:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named: else Nagle stays on
    listening.bind(("127.0.0.1", 0))
    no_limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=f"http://{engine}", timeout=None, limits=no_limits, trust_env=False
    ) as client:
        routes = [Route(path, Relay(client).pass_on, methods=["POST"]) for path in PATHS]
        config = uvicorn.Config(Starlette(routes=routes), log_config=None, access_log=False, lifespan="off", ws="none")
        server = Server(config)

        def end() -> None:
            server.should_exit = True

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
        print(json.dumps({"http": f"127.0.0.1:{listening.getsockname()[1]}"}), flush=True)
        await server.serve(sockets=[listening])


if __name__ == "__main__":
    if "--uvloop" in sys.argv:
        import uvloop

        uvloop.run(serve(sys.argv[1]))
    else:
        asyncio.run(serve(sys.argv[1]))
