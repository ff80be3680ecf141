"""`make vllm`: an unmodified vLLM with the toy model on its usual port, until it is told to stop.

Its sixteen adapters lie in a folder that is told; none is loaded.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from pathlib import Path

from tests.e2e.vllm.installed import NotInstalled
from tests.e2e.vllm.server import StartFailed, VllmServer
from tests.e2e.vllm.toy import Toy

PORT = 8000


async def run() -> None:
    ended = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, ended.set)
    with tempfile.TemporaryDirectory(prefix="vllm-toy-") as folder:
        toy = Toy(Path(folder))
        print("making the toy model …", flush=True)
        await asyncio.to_thread(toy.make)
        server = VllmServer(Path(folder), toy.model, port=PORT)
        print("starting vLLM, which takes half a minute …", flush=True)
        starting = asyncio.create_task(server.start())
        waiting = asyncio.create_task(ended.wait())
        await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
        try:
            if starting.done():
                starting.result()
                print(f"vLLM is ready: {server.url}/v1, model base; adapters to load: {toy.adapters}", flush=True)
                await ended.wait()
        finally:
            starting.cancel()
            waiting.cancel()
            await asyncio.gather(starting, waiting, return_exceptions=True)
            await server.stop()


def main() -> None:
    try:
        asyncio.run(run())
    except (NotInstalled, StartFailed, RuntimeError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
