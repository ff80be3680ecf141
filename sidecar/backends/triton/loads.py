"""The serving process's side of the loader process: send orders, await results, replace a process that died."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sidecar.backends import wire
from sidecar.backends.api import LoadResult, Weights
from sidecar.core.effects import Load

logger = logging.getLogger(__name__)

LINE_BYTES_MAX = 1 << 22
END_S = 5.0
"""How long a loader process may take to end."""
TRIES = 2
"""Processes that one load is given to. If both end during it, the core is told."""


@dataclass(frozen=True)
class Target:
    """The server and model that takes a backend's loads."""

    address: str
    connection: int
    """Grows when the server was lost. A connection to the one before breaks at the next load, or hangs."""
    model: str
    decoupled: bool
    tls: dict[str, str] | None = None
    owner: str = ""
    """The replica that sends them."""


class LoaderProcess:
    """Sends loads through one child process, which is restarted if it dies."""

    def __init__(self) -> None:
        self._child: _Child | None = None
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        return self._child.process.pid if self._child is not None and self._child.lives else None

    async def load(
        self,
        effect: Load,
        weights: Weights,
        target: Target,
        timeout_s: float,
        sent: Callable[[], None],
        region: str | None = None,
    ) -> LoadResult:
        """Send one load and return how it ended. Cancelling this cancels the load.

        The engine reads the weights from `region`, or from the message if that is None. `sent` is called once they have
        been sent.
        """
        order = _order(effect, weights, target, timeout_s) | {"region": region}
        for _ in range(TRIES):
            try:
                child = await self._running()
            except OSError as error:
                return LoadResult(f"the loader process cannot be started: {error}", unanswered=True)
            result = await child.load(order, sent)
            if result is not None:
                return result
        return LoadResult(f"the loader process ended {TRIES} times under this load", unanswered=True)

    async def start(self) -> None:
        """Start the process before the first load needs it: that takes some tenths of a second."""
        await self._running()

    async def close(self) -> None:
        """End the process. No load may be under way."""
        if self._child is not None:
            await self._child.close()

    async def _running(self) -> _Child:
        async with self._starting:
            if self._child is None or not self._child.lives:
                self._child = _Child(await _start())
            return self._child


async def _start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sidecar.backends.triton.loader",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_BYTES_MAX,
    )


class _Child:
    """One process and the loads that it was given."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._waiting: dict[int, asyncio.Future[LoadResult | None]] = {}
        self._sent: dict[int, Callable[[], None]] = {}
        self._closing = False
        self._reader = asyncio.create_task(self._read())

    @property
    def lives(self) -> bool:
        return self.process.returncode is None and not self._reader.done()

    async def load(self, order: dict[str, Any], sent: Callable[[], None]) -> LoadResult | None:
        """Send an order and return its result; None if the process ended meanwhile."""
        future: asyncio.Future[LoadResult | None] = asyncio.get_running_loop().create_future()
        self._waiting[order["load"]] = future
        self._sent[order["load"]] = sent
        try:
            self._send(order)
            return await future if self.lives else None
        except asyncio.CancelledError:
            self._send({"cancel": order["load"]})
            raise
        finally:
            del self._waiting[order["load"]], self._sent[order["load"]]

    async def close(self) -> None:
        self._closing = True
        assert self.process.stdin is not None
        self.process.stdin.close()
        _, standing = await asyncio.wait([self._reader], timeout=END_S)
        if standing:  # a file system that does not answer keeps it, and would keep the sidecar
            logger.warning("the loader process did not end within %g s and is killed", END_S)
            with suppress(ProcessLookupError):  # it has just ended, and the end of what it wrote is on its way
                self.process.kill()
        await self._reader

    def _send(self, record: dict[str, Any]) -> None:
        """Write a line without waiting for room: orders are small, and bounded by the loads in flight."""
        stdin = self.process.stdin
        assert stdin is not None
        if not stdin.is_closing():
            stdin.write(json.dumps(record).encode() + b"\n")

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self._take(json.loads(line))
        code = await self.process.wait()
        if not self._closing:
            logger.error("the loader process ended with code %s; the next load starts another", code)
        for future in self._waiting.values():
            if not future.done():
                future.set_result(None)

    def _take(self, record: dict[str, Any]) -> None:
        load = record.pop("load")
        if load not in self._waiting:
            return  # it was cancelled
        if "sent" in record:
            self._sent[load]()
        elif not self._waiting[load].done():
            self._waiting[load].set_result(LoadResult(**record))


def _order(effect: Load, weights: Weights, target: Target, timeout_s: float) -> dict[str, Any]:
    return {
        "load": effect.load,
        "id": f"lora-sidecar-load-{effect.load}",
        "parameters": {"lora_name": effect.name, **wire.owner_parameters(target.owner, effect.epoch)},
        "address": target.address,
        "connection": target.connection,
        "tls": target.tls,
        "model": target.model,
        "decoupled": target.decoupled,
        "timeout_s": timeout_s,
        "task_id": str(effect.packed.task_id),
        "path": weights.path,
        "shape": list(weights.shape),
        "dtype": weights.dtype,
        "size_bytes": weights.size_bytes,
        "config": base64.b64encode(weights.config).decode(),
    }
