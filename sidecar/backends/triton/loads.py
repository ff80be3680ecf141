"""The serving process's end of the loader process: orders out, results in, a new process when one dies."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sidecar.backends.api import LoadResult, Weights
from sidecar.backends.triton import wire
from sidecar.core.effects import Load

logger = logging.getLogger(__name__)

LINE_BYTES_MAX = 1 << 22
TRIES = 2
"""Processes that one load is given to: if both end under it, it is told to the core."""


@dataclass(frozen=True)
class Target:
    """Where and how a backend takes loads."""

    address: str
    model: str
    decoupled: bool
    tls: dict[str, str] | None = None
    owner: str = ""
    """The replica that sends them."""


class LoaderProcess:
    """Sends loads through one child process, started anew when it dies."""

    def __init__(self) -> None:
        self._child: _Child | None = None
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is none."""
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
        """Send one load and return how it ended. `sent` is called when its weights have left; cancelling cancels it.

        With a `region` the engine reads them there, else they travel in the message.
        """
        order = _order(effect, weights, target, timeout_s) | {"region": region}
        for _ in range(TRIES):
            try:
                child = await self._living()
            except OSError as error:
                return LoadResult(f"the loader process cannot be started: {error}", unanswered=True)
            result = await child.load(order, sent)
            if result is not None:
                return result
        return LoadResult(f"the loader process ended {TRIES} times under this load", unanswered=True)

    async def start(self) -> None:
        """Have a process ready before the first load asks for one: starting takes some tenths of a second."""
        await self._living()

    async def close(self) -> None:
        """End the process. No load may be under way."""
        if self._child is not None:
            await self._child.close()

    async def _living(self) -> _Child:
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
    """One process and the loads it has been given."""

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
        """Give an order and return its result; None when the process ended under it."""
        future: asyncio.Future[LoadResult | None] = asyncio.get_running_loop().create_future()
        self._waiting[order["load"]] = future
        self._sent[order["load"]] = sent
        try:
            self._tell(order)
            return await future if self.lives else None
        except asyncio.CancelledError:
            self._tell({"cancel": order["load"]})
            raise
        finally:
            del self._waiting[order["load"]], self._sent[order["load"]]

    async def close(self) -> None:
        self._closing = True
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self._reader

    def _tell(self, record: dict[str, Any]) -> None:
        """Write a line. Orders are few and small, and are bounded by what is in flight: no need to wait for room."""
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
