"""Pods without a cluster: a rendered container as a process, ended as the kubelet does it, and a balancer in front."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.e2e.helm.rendering import Object
from tests.kit.redis_servers import free_port

DATA, PROBES = 0, 5
"""The last digits of the listeners' ports, 9000 and on."""


@dataclass
class Pod:
    """One gateway, with a loopback address of its own in place of the pod's and other ports than 9000 and on."""

    template: Object
    configuration: str
    address: str
    ports: str
    folder: Path
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)

    def at(self, listener: int) -> str:
        return f"{self.address}:{self.ports}{listener}"

    @property
    def _container(self) -> Object:
        found: Object = self.template["spec"]["containers"][0]
        return found

    async def start(self) -> None:
        """Start it, and return when its readiness probe says yes."""
        self.folder.mkdir()
        file = self.folder / "config.yaml"
        text = self.configuration.replace("127.0.0.1:9001", f"127.0.0.1:{free_port()}")
        file.write_text(text.replace("0.0.0.0:900", f"{self.address}:{self.ports}"))
        named = {each["name"]: each["value"] for each in self._container["env"] if "value" in each}
        given = {
            name: value.replace("$(POD_IP)", self.address).replace(":900", f":{self.ports}")
            for name, value in named.items()
        }
        command = [part if part.startswith("-") or part == "serve" else str(file) for part in self._container["args"]]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sidecar", *command, env=os.environ | given, stdout=asyncio.subprocess.DEVNULL
        )
        probe = self._container["readinessProbe"]["httpGet"]
        async with httpx.AsyncClient() as client:
            while not await _is_ready(client, f"http://{self.at(PROBES)}{probe['path']}"):
                assert self.process.returncode is None, "it ended by itself"
                await asyncio.sleep(0.05)

    async def end(self) -> int:
        """Run the preStop hook, send SIGTERM, and return the exit code; SIGKILL when the grace is over."""
        assert self.process is not None
        async with asyncio.timeout(self.template["spec"]["terminationGracePeriodSeconds"]):
            hook = self._container["lifecycle"]["preStop"]["exec"]["command"]
            before = await asyncio.create_subprocess_exec(*hook)
            await before.wait()
            self.process.send_signal(signal.SIGTERM)
            return await self.process.wait()

    async def kill(self) -> None:
        """End what a test has left."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


async def _is_ready(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).status_code == 200
    except httpx.TransportError:
        return False


class Balancer:
    """What a Service is: each new connection goes to the next of the pods that it knows of."""

    def __init__(self) -> None:
        self.pods: list[Pod] = []
        self._turns = itertools.count()
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        """Return the address that clients use."""
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    def stop(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pod = self.pods[next(self._turns) % len(self.pods)]
        host, _, port = pod.at(DATA).rpartition(":")
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(_pump(reader, back), _pump(there, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
