"""Adapters updated and unregistered while clients ask for them: each answer is one version's, and none is stale."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.proto import admin_pb2
from tests.e2e.vllm.direct import http_client, registered
from tests.e2e.vllm.fronted import Front, Told, ask, in_front
from tests.e2e.vllm.server import VllmServer
from tests.e2e.vllm.toy import Toy, all_different, prompt, write_version
from tests.kit.faults import assert_nothing_left
from tests.kit.serving import until

pytestmark = pytest.mark.nightly

SWITCHES = 20
CLIENTS = 12
TOKENS = 8
PROMPT = prompt(3, 150)
"""Longer than a KV block, so that every version meets the prefixes of those before it."""
LIVE, OTHERS = "live", ("left", "right")
BETWEEN = 3
"""Answers of the live adapter between two switches, at least."""


@dataclass
class Asked:
    """An answer, and which version was current when it was asked for."""

    told: Told
    current: int


class Clients:
    """Some clients, of which every other one asks for the live adapter, each again as soon as it is answered."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._going = True
        self.current = 1
        self.asked: list[Asked] = []
        self._tasks = [asyncio.create_task(self._ask_on(number)) for number in range(CLIENTS)]

    def of(self, name: str) -> list[Asked]:
        return [one for one in self.asked if one.told.model == name]

    async def more(self, name: str, count: int) -> None:
        """Wait until so many more have been answered."""
        before = len(self.of(name))
        await until(lambda: len(self.of(name)) >= before + count)

    async def finish(self) -> None:
        self._going = False
        await asyncio.gather(*self._tasks)

    async def _ask_on(self, number: int) -> None:
        name = LIVE if number % 2 else OTHERS[number // 2 % len(OTHERS)]
        while self._going:
            current = self.current
            told = await ask(self._front.client, name, PROMPT, TOKENS, stream=number % 4 > 1)
            self.asked.append(Asked(told, current))


@asynccontextmanager
async def loaded(server: VllmServer, folders: dict[str, Path], scratch: Path) -> AsyncIterator[tuple[Front, Clients]]:
    """Run a sidecar with some adapters registered, and clients that ask for them."""
    async with in_front(server, None, scratch) as front:
        for name, path in folders.items():
            await register(front, name, path)
        clients = Clients(front)
        try:
            yield front, clients
        finally:
            await clients.finish()
        await assert_nothing_left(front.served)


async def register(front: Front, name: str, path: Path) -> None:
    await front.served.adapters.Register(admin_pb2.RegisterRequest(name=name, path=str(path)))


async def test_twenty_switches_under_load(server: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """No request fails. Each answer is all of one version, as PEFT gives it, and not of one that had been replaced."""
    versions = [write_version(tmp_path / f"v{number}", seed=number) for number in range(1, SWITCHES + 2)]
    others = {name: write_version(tmp_path / name, seed=900 + number) for number, name in enumerate(OTHERS)}
    right = [toy.greedy(path, PROMPT, TOKENS) for path in versions]
    right_others = {name: toy.greedy(path, PROMPT, TOKENS) for name, path in others.items()}
    assert all_different([*right, *right_others.values()])
    async with loaded(server, {LIVE: versions[0]} | others, tmp_path) as (front, clients):
        for number, path in enumerate(versions[1:], 2):
            await clients.more(LIVE, BETWEEN)
            await register(front, LIVE, path)
            clients.current = number
        await clients.more(LIVE, BETWEEN)
    assert [one.told.error for one in clients.asked if one.told.error or not one.told.whole] == []
    seen = set()
    for one in clients.of(LIVE):
        version = right.index(one.told.tokens) + 1
        assert one.told.version == f"{LIVE}@v{version}"
        assert version >= one.current, f"v{version} after v{one.current} had been registered"
        seen.add(version)
    assert len(seen) >= SWITCHES / 2
    assert SWITCHES + 1 in seen
    for name, tokens in right_others.items():
        assert all(one.told.tokens == tokens for one in clients.of(name))
    print(f"\n{len(clients.asked)} answers, {len(clients.of(LIVE))} of the live adapter, of {len(seen)} versions")


async def test_unregistered_under_load(server: VllmServer, toy: Toy, tmp_path: Path) -> None:
    """Whoever asked before gets the whole answer, whoever asks later is told that there is no such adapter."""
    path = write_version(tmp_path / "v1", seed=1)
    others = {name: write_version(tmp_path / name, seed=900 + number) for number, name in enumerate(OTHERS)}
    right = {name: toy.greedy(folder, PROMPT, TOKENS) for name, folder in ({LIVE: path} | others).items()}
    async with loaded(server, {LIVE: path} | others, tmp_path) as (front, clients):
        await clients.more(LIVE, 10)
        folder = front.staged(LIVE)
        assert folder.is_dir()
        await front.served.adapters.Unregister(admin_pb2.AdapterRequest(name=LIVE))
        clients.current = 2
        await until(lambda: any(one.current == 2 for one in clients.of(LIVE)))
        await clients.more(OTHERS[0], 10)
        async with http_client(server.http_address) as direct:
            async with asyncio.timeout(60):
                while any(name.startswith(f"{LIVE}@") for name in await registered(direct)):
                    await asyncio.sleep(0.05)
        await until(lambda: not folder.exists())
        assert server.is_running
    for one in clients.of(LIVE):
        if one.told.status == 200:
            assert one.current == 1
            assert one.told.tokens == right[LIVE]
        else:
            assert one.told.status == 404
            assert f'unknown adapter "{LIVE}"' in one.told.error
    for name in OTHERS:
        assert all(one.told.tokens == right[name] for one in clients.of(name))
