"""An emulated engine in a process of its own, which tests kill, stop, freeze and start again."""

from __future__ import annotations

import asyncio
import json
from signal import SIGKILL, SIGTERM, Signals
from typing import Self

from tests.kit.forked import Forked, python
from tests.kit.ports import free_port


class EmulatorProcess:
    """`python -m sidecar.lab.engine`. `arguments` are options of `sidecar emulate`, as on a command line.

    `ports` has the engine's listeners by the names that its ready line has: `grpc`, `metrics`, `http`; 0 is a free
    port. A `start` after `kill` or after its own end uses the same ports, without adapters.
    """

    def __init__(self, *arguments: str, **ports: int) -> None:
        self._arguments = arguments
        self._ports = {name: port or free_port() for name, port in ports.items()}
        self._process: Forked | None = None

    def address(self, listener: str) -> str:
        """Return host and port of a listener."""
        return f"127.0.0.1:{self._ports[listener]}"

    async def start(self) -> None:
        """Start the process and return when it takes requests. Raises RuntimeError if it ends instead."""
        ports = [option for name, port in self._ports.items() for option in (f"--{name}-port", str(port))]
        command = ("-m", "sidecar.lab.engine", *self._arguments, *ports, "--json")
        self._process = await python(*command, stdout=asyncio.subprocess.PIPE)
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the emulated engine ended with {await self.wait()} before it was ready")
        ready = json.loads(line)
        assert {name: int(ready[name].rsplit(":", 1)[1]) for name in self._ports} == self._ports

    def signal(self, number: Signals) -> None:
        """Send a signal, such as SIGSTOP, which freezes it."""
        assert self._process is not None
        self._process.send_signal(number)

    async def kill(self) -> None:
        """End the process as `kill -9` does."""
        await self._end(SIGKILL)

    async def stop(self) -> int:
        """Ask the process to end and return its exit status."""
        return await self._end(SIGTERM)

    async def wait(self) -> int:
        """Wait until the process ends by itself and return its exit status."""
        assert self._process is not None
        status = await self._process.wait()
        # Closing the pipes now keeps their transports from being finalized after the loop is gone.
        self._process.close()
        return status

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None and self._process.returncode is None:
            await self.kill()

    async def _end(self, number: Signals) -> int:
        assert self._process is not None
        if self._process.returncode is None:
            self.signal(number)
        return await self.wait()
