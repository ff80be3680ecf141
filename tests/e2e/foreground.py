"""A real server in the foreground, until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from tests.e2e.installed import NotInstalled
from tests.e2e.server import Server, StartFailed

TOLD_EVERY_S = 5.0
LINE_MAX = 120

Make = Callable[[Path], tuple[Server, str]]
"""Makes a server in a folder; returns with it what is printed when it is ready."""


def serve(prefix: str, make: Make) -> None:
    """Run a server in a folder for temporary files until SIGTERM or Ctrl-C, and exit with the reason if it cannot."""
    try:
        asyncio.run(_serve(prefix, make))
    except (NotInstalled, StartFailed) as error:
        sys.exit(str(error))


async def _tell(server: Server) -> None:
    """Print that a server starts, and from time to time the last line of its log."""
    print(f"{server.NAME} starts, within {server.START_S:g} s; its log is {server.log_path}", flush=True)
    begun = monotonic()
    while True:
        await asyncio.sleep(TOLD_EVERY_S)
        last = server.log_tail(1)[:LINE_MAX]
        print(f"{server.NAME} is starting, {monotonic() - begun:.0f} s" + (f": {last}" if last else ""), flush=True)


async def _serve(prefix: str, make: Make) -> None:
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        server, ready = await asyncio.to_thread(make, Path(folder))
        starting = asyncio.create_task(server.start())
        waiting = asyncio.create_task(told.wait())
        telling = asyncio.create_task(_tell(server))
        await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
        telling.cancel()
        try:
            if starting.done():
                starting.result()
                print(ready, flush=True)
                await waiting
        finally:
            starting.cancel()
            waiting.cancel()
            await asyncio.gather(starting, waiting, return_exceptions=True)
            await server.stop()
