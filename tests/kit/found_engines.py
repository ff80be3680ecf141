"""Emulated engines behind one name: each at its own address on this machine, all at one port.

`Names` plays the name server for the sidecar's own finder; tests change its answers.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from sidecar.config import parse
from sidecar.config.discover import Discover
from sidecar.discovery.dns import DnsFinder
from sidecar.discovery.found import Finder
from sidecar.serve.app import Sidecar
from sidecar.serve.discovered import finder_of
from tests.kit.emulated import start_engine
from tests.kit.serving import Recorder, Serving, until, written

HOST = "engines.test"
DUMMY = {"compute": "none", "shape": "tiny"}
FREE = {"address": "127.0.0.1:0"}


class Names:
    """A name server's answer for the one name: `addresses`, or the error `trouble`."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.trouble: int | None = None
        self.asked = 0

    async def ask(self, host: str, port: int, family: socket.AddressFamily) -> list[str]:
        self.asked += 1
        if self.trouble is not None:
            raise socket.gaierror(self.trouble, "as the test wants it")
        if host != HOST or family is not socket.AF_INET or not self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return list(self.addresses)

    def finder(self, discover: Discover) -> DnsFinder:
        """Return the finder of a configured pool, which resolves here, and often."""
        assert discover.dns is not None
        host, _, port = discover.dns.rpartition(":")
        return DnsFinder(host, int(port), every_s=0.02, empty_s=discover.empty_s, ask=self.ask)


class Pool:
    """Engines by address. All use `port`, which the system chose for the first one."""

    def __init__(self, names: Names, **options: Any) -> None:
        self.names = names
        self.engines: dict[str, Any] = {}
        self.port = 0
        self._options = DUMMY | options
        self._count = 1

    async def start(self, address: str = "", **options: Any) -> str:
        """Start an engine and name it; return its address."""
        if not address:
            self._count += 1
            address = f"127.0.0.{self._count}"
        engine = await start_engine(host=address, grpc_port=self.port, **(self._options | options))
        self.port = int(engine.grpc_address.rpartition(":")[2])
        self.engines[address] = engine
        self.names.addresses.append(address)
        return address

    def unname(self, address: str) -> None:
        self.names.addresses.remove(address)

    async def stop(self, address: str) -> None:
        await self.engines.pop(address).stop()

    def config(self, adapters: Path, **record: Any) -> dict[str, Any]:
        """Return the configuration of a sidecar in front of these engines; `discover` adds fields to its pool."""
        discover = {"dns": f"{HOST}:{self.port}", "grace_s": 0.1, "empty_s": 0.2} | record.pop("discover", {})
        return {
            "backends": [{"id": "gpu", "kind": "triton", "discover": discover}],
            "listeners": {"data": FREE, "admin": FREE, "http": FREE},
            "adapters": {"serve": str(adapters), "roots": [str(adapters)]},
        } | record


@asynccontextmanager
async def pool_of(count: int, **options: Any) -> AsyncIterator[Pool]:
    """Run `count` named engines for the length of a block; all running ones are stopped at its end."""
    pool = Pool(Names(), **options)
    try:
        for _ in range(count):
            await pool.start()
        yield pool
    finally:
        for address in list(pool.engines):
            await pool.stop(address)


@asynccontextmanager
async def in_front(
    config: dict[str, Any], find: Callable[[Discover], Finder] = finder_of, file: Path | None = None
) -> AsyncIterator[Serving]:
    """Run a sidecar for the length of a block; it ends as if killed. Its configuration is in `file`, if given."""
    source = None if file is None else written(file, config)
    sidecar = await Sidecar.start(parse(config, "the test"), find, source=source)
    recorder = Recorder()
    sidecar.gateway.observe(recorder)
    try:
        async with (
            grpc.aio.insecure_channel(sidecar.data_address) as data,
            grpc.aio.insecure_channel(sidecar.admin_address) as admin,
        ):
            yield Serving(sidecar, recorder, data, admin)
    finally:
        await sidecar.stop()


@asynccontextmanager
async def served(
    pool: Pool, config: dict[str, Any], names: Names | None = None, file: Path | None = None
) -> AsyncIterator[Serving]:
    """Run a sidecar that resolves these names, by default the pool's."""
    async with in_front(config, (names or pool.names).finder, file) as serving:
        yield serving


def up(serving: Serving) -> set[str]:
    """Return the addresses of the engines to which a sidecar sends requests."""
    return {backend.id.removeprefix("gpu-") for backend in serving.state.backends.values() if backend.takes_requests}


class Load:
    """Clients of one or several sidecars that send requests continuously and check every answer."""

    def __init__(
        self, pool: Sequence[Serving], clients: int = 12, tokens: int = 6, tenants: Sequence[str] = ("",)
    ) -> None:
        self._pool = pool
        self._tenants = tenants
        self._tokens = tokens
        self._names = sorted(pool[0].state.names)
        self._going = True
        self.answered = 0
        self._clients = [asyncio.create_task(self._ask_on(number)) for number in range(clients)]

    async def _ask_on(self, number: int) -> None:
        while self._going:
            name = self._names[(number + self.answered) % len(self._names)]
            serving = self._pool[number % len(self._pool)]
            tenant = self._tenants[self.answered % len(self._tenants)]
            answer = await serving.ask(name, tokens=self._tokens, tenant=tenant)
            assert answer.tokens == serving.expected(name, self._tokens)
            assert len(answer.origins) == 1
            self.answered += 1

    async def more(self, count: int) -> None:
        """Wait until so many more have been answered; fails with the first client that failed."""
        goal = self.answered + count
        await until(lambda: self.answered >= goal or any(client.done() for client in self._clients))
        if any(client.done() for client in self._clients):
            await self.end()

    async def end(self) -> None:
        self._going = False
        await asyncio.gather(*self._clients)


@asynccontextmanager
async def loaded(*pool: Serving, **options: Any) -> AsyncIterator[Load]:
    load = Load(pool, **options)
    yield load
    await load.end()
