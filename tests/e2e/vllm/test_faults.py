"""A vLLM that is killed under load, and files that are kept for as long as the engine may look for them."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from pathlib import Path

import httpx
import pytest

from sidecar.core.effects import Drop
from tests.e2e.vllm.direct import at_once, http_client, registered
from tests.e2e.vllm.fronted import Front, Told, ask, ask_into, in_front
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import NAMES, Toy, prompt
from tests.kit.faults import assert_nothing_left
from tests.kit.serving import until

pytestmark = pytest.mark.nightly

CLIENTS = 24
TOKENS = 96
PROMPT = prompt(5, 12)
RESTART_S = 300.0


class Clients:
    """Some clients at a time over some adapters, each asking again when it is answered; every other one streams."""

    def __init__(self, front: Front, names: list[str]) -> None:
        self._front = front
        self._names = itertools.cycle(names)
        self._going = True
        self.told: list[tuple[bool, Told]] = []
        self._tasks = [asyncio.create_task(self._ask_on(bool(number % 2))) for number in range(CLIENTS)]

    async def more(self, count: int, patience_s: float = 60.0) -> None:
        """Wait until so many more have got a whole answer."""
        before = self.right
        await until(lambda: self.right >= before + count, patience_s)

    async def begun(self) -> None:
        """Wait until some streams have told a part of their answer."""
        await until(lambda: sum(bool(one.tokens) and not one.whole for _, one in self.told) >= 3)

    @property
    def right(self) -> int:
        return sum(one.whole for _, one in self.told)

    async def __aenter__(self) -> Clients:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._going = False
        await asyncio.gather(*self._tasks)

    async def _ask_on(self, stream: bool) -> None:
        while self._going:
            told = Told(next(self._names), 0)
            self.told.append((stream, told))
            await ask_into(told, self._front.client, PROMPT, TOKENS, stream)


async def test_killed_under_load(either: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """It comes back with no adapter: they are loaded again when asked for, and no client hears that one is not there.

    An answer that had begun breaks off with the reason, right so far; all others are answered, once.
    """
    names = NAMES[:5]
    right = {name: toy.greedy(toy.adapters / name, PROMPT, TOKENS) for name in names}
    async with in_front(either, toy.adapters, tmp_path) as front:
        async with Clients(front, names) as clients:
            await clients.more(2 * CLIENTS)
            await clients.begun()
            await either.kill()
            await until(lambda: not front.served.state.backends["vllm-0"].takes_requests)
            await either.start()
            await clients.more(2 * CLIENTS, RESTART_S)
        async with http_client(either.http_address) as direct:
            assert {name.partition("@")[0] for name in await registered(direct)} <= set(names)
        await assert_nothing_left(front.served)
    broken = []
    for stream, told in clients.told:
        if told.whole:
            assert told.tokens == right[told.model]
        else:
            broken.append(told)
            assert stream, f"{told.status} {told.error}"
            assert told.status == 200
            assert "not found" not in told.error
            assert "does not exist" not in told.error
            assert "an answer that has begun is never repeated" in told.error
            assert told.tokens == right[told.model][: len(told.tokens)]
    print(f"\n{clients.right} whole answers, {len(broken)} broken off")
    assert 0 < len(broken) <= CLIENTS


async def test_sources_deleted_while_registered(server: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """What ends a bare engine: the owner deletes the files, the engine drops the adapter, somebody asks for it."""
    shutil.copytree(toy.adapters, tmp_path / "adapters")
    names = NAMES[:8]
    right = {name: toy.greedy(toy.adapters / name, PROMPT, TOKENS) for name in names}
    async with in_front(server, tmp_path / "adapters", tmp_path) as front:
        for _ in range(2):
            told = await at_once(4, [lambda name=name: ask(front.client, name, PROMPT, TOKENS) for name in names])
            assert [one.tokens for one in told] == list(right.values())
            shutil.rmtree(tmp_path / "adapters", ignore_errors=True)
        assert server.is_running


async def test_a_store_that_is_too_small(either: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """Files come and go all the while, and at no time does the engine have a name whose files are not there."""
    size = max(sum(file.stat().st_size for file in path.iterdir()) for path in toy.adapters.iterdir())
    right = {name: toy.greedy(toy.adapters / name, PROMPT, TOKENS) for name in NAMES}
    store = {"memory_bytes": 5 * size}
    async with (
        in_front(either, toy.adapters, tmp_path, store=store) as front,
        http_client(either.http_address) as direct,
    ):
        looked = asyncio.create_task(look_for_missing(direct, ended := asyncio.Event()))
        asks = [lambda name=name: ask(front.client, name, PROMPT, TOKENS) for name in NAMES * 4]
        told = await at_once(CLIENTS, asks)
        ended.set()
        looks, missing = await looked
        assert looks > 10
        assert missing == []
        assert [one.tokens for one in told] == list(right.values()) * 4
        assert front.served.recorder.count(Drop) >= len(NAMES)
        assert len(await registered(direct)) < len(NAMES)
    async with http_client(either.http_address) as direct:
        assert await registered(direct) == {}


async def look_for_missing(direct: httpx.AsyncClient, ended: asyncio.Event) -> tuple[int, list[str]]:
    """Look, until it has ended, for names whose folder is gone; returns how often, and what was found.

    A name that was unloaded after the server had listed it is not registered any more: the second list says so.
    """
    looks, missing = 0, []
    while not ended.is_set():
        listed = await registered(direct)
        gone = await asyncio.to_thread(
            lambda listed=listed: {name for name in listed if not Path(listed[name]).is_dir()}
        )
        missing += sorted(gone & set(await registered(direct))) if gone else []
        looks += 1
        await asyncio.sleep(0.01)
    return looks, missing
