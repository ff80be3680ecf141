"""What vLLM does, and the emulator with it: unloads under way, clients that leave, and the cache of prefixes."""

from __future__ import annotations

import asyncio

import httpx

from tests.e2e.vllm.direct import complete, completion, load, metrics, unload
from tests.e2e.vllm.faces import Face, remove

PROMPT = [3, 4, 5]


async def test_unload_under_way(face: Face, client: httpx.AsyncClient) -> None:
    """It forgets the name, at once; what runs goes on to its end, and the next request is unknown."""
    await load(client, "sql", face.adapter())
    whole = await complete(client, "sql", PROMPT, 200)
    running = asyncio.create_task(complete(client, "sql", PROMPT, 200))
    await has_running(client)
    assert (await unload(client, "sql")).status_code == 200
    assert not running.done()
    assert (await client.post("/v1/completions", json=completion("sql", PROMPT, 1))).status_code == 404
    assert await running == whole


async def test_a_client_that_leaves(face: Face, client: httpx.AsyncClient) -> None:
    """Its request ends with it."""
    await load(client, "sql", face.adapter())
    async with client.stream("POST", "/v1/completions", json=completion("sql", PROMPT, 1000, stream=True)) as reply:
        await anext(reply.aiter_raw())
    async with asyncio.timeout(60):
        while (await metrics(client)).running:
            await asyncio.sleep(0.01)
    assert (await client.get("/health")).status_code == 200


async def test_changed_files_under_a_name_and_path_that_were_seen(face: Face, client: httpx.AsyncClient) -> None:
    """What was asked before the change is answered like neither when it is asked again; a new prompt rightly."""
    path = face.adapter(seed=1)
    seen, new = [5 + n % 200 for n in range(300)], [7 + n % 150 for n in range(300)]
    await load(client, "sql", path)
    old = await complete(client, "sql", seen, 8)
    renewed = face.adapter(seed=2)
    await load(client, "fresh", renewed)
    right = {tuple(asked): await complete(client, "fresh", asked, 8) for asked in (seen, new)}
    remove(path)
    renewed.rename(path)
    await unload(client, "sql")
    assert (await load(client, "sql", path)).status_code == 200
    assert await complete(client, "sql", seen, 8) not in (old, right[tuple(seen)])
    assert await complete(client, "sql", new, 8) == right[tuple(new)]


async def has_running(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while not (await metrics(client)).running:
            await asyncio.sleep(0.005)
