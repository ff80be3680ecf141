"""A relay of an OpenAI API that does nothing: aiohttp to the engine and to the client. The reference of `openai`.

The best relay that anybody would write in Python: httpx and starlette cost several times as much.

python -m tests.bench.bare_openai HOST:PORT
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from functools import partial
from typing import Any

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

PATHS = ("/v1/completions", "/v1/chat/completions")


async def pass_on(session: ClientSession, engine: str, request: web.Request) -> web.StreamResponse:
    """Pass a request on to the engine, and what comes back to the client as it comes."""
    headers = {"content-type": "application/json"}
    async with session.post(f"http://{engine}{request.path}", data=await request.read(), headers=headers) as reply:
        response = web.StreamResponse(status=reply.status, headers={"content-type": reply.headers["content-type"]})
        await response.prepare(request)
        async for piece in reply.content.iter_any():
            await response.write(piece)
        await response.write_eof()
        return response


async def serve(engine: str) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with ClientSession(timeout=ClientTimeout(total=None), connector=TCPConnector(limit=0)) as session:
        app = web.Application()
        handler: Any = partial(pass_on, session, engine)
        app.add_routes([web.post(path, handler) for path in PATHS])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        print(json.dumps({"http": "{}:{}".format(*runner.addresses[0])}), flush=True)
        await ended.wait()
        await runner.cleanup()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
