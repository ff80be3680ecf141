"""Load on a sidecar in front of real Tritons: many clients, and proof from the engines' own logs of what ran."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tests.e2e.triton.repository import Repository
from tests.e2e.triton.server import TritonServer

ENGINE: dict[str, Any] = {"compute": "none", "shape": "tiny"}
LOAD_IDS = ("lora-sidecar-",)
"""How the ids of the sidecar's own requests begin: loads and probes."""


@asynccontextmanager
async def servers(
    folder: Path, count: int = 1, control: str = "none", engine: dict[str, Any] | None = None, **repository: Any
) -> AsyncIterator[list[TritonServer]]:
    """Run servers with equal models, started at once; `engine` are their options beside those of ENGINE."""
    models = Repository(engine=ENGINE | (engine or {}), **repository)
    made = [TritonServer(folder / f"triton-{number}", models, control) for number in range(count)]
    async with AsyncExitStack() as stack:
        for server in made:
            stack.push_async_callback(server.kill)
        await asyncio.gather(*(server.start() for server in made))
        yield made


async def at_once(limit: int, items: Sequence[Any], ask: Callable[[Any], Awaitable[Any]]) -> list[Any]:
    """Ask for each item, no more than so many at a time; returns the answers in the items' order."""
    free = asyncio.Semaphore(limit)

    async def one(item: Any) -> Any:
        async with free:
            return await ask(item)

    return await asyncio.gather(*(one(item) for item in items))


def clients_runs(made: Sequence[TritonServer]) -> list[dict[str, Any]]:
    """Return the endings of all requests that were not the sidecar's own, of all servers."""
    return [one for server in made for one in server.served if not one["request_id"].startswith(LOAD_IDS)]


def outcomes(made: Sequence[TritonServer]) -> Counter[str]:
    """Count the outcomes of what ran for clients. Fails where an attempt ran twice."""
    runs = clients_runs(made)
    twice = [request for request, times in Counter(one["request_id"] for one in runs).items() if times > 1]
    assert not twice, f"ran twice: {twice[:5]}"
    return Counter(one["outcome"] for one in runs)


def asked_of(made: Sequence[TritonServer], outcome: str = "done") -> Counter[str]:
    """Count by request, whatever the attempt, how often an engine answered it so."""
    return Counter(one["request_id"].partition(".")[0] for one in clients_runs(made) if one["outcome"] == outcome)
