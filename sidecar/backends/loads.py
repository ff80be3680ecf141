"""The serving process's end of the loader process: orders out, results in, a new process when one dies."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import sys
from dataclasses import dataclass
from typing import Any

from sidecar.backends.api import Weights
from sidecar.core.effects import Load

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadResult:
    """How a load ended: `error` is the engine's text, None when it came through; `lost` when the wire broke."""

    error: str | None
    lost: bool = False


@dataclass(frozen=True)
class Target:
    """Where and how a backend takes loads."""

    address: str
    model: str
    decoupled: bool
    tls: dict[str, str] | None = None


class LoaderProcess:
    """Sends loads through one child process, started with the first order."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[LoadResult]] = {}
        self._starting = asyncio.Lock()

    async def load(self, effect: Load, weights: Weights, target: Target, timeout_s: float) -> LoadResult:
        """Send one load and return how it ended. Cancelling this cancels the call."""
        order = _order(effect, weights, target, timeout_s)
        future: asyncio.Future[LoadResult] = asyncio.get_running_loop().create_future()
        self._waiting[effect.load] = future
        try:
            await self._write(order)
            return await future
        except asyncio.CancelledError:
            self._order_now({"cancel": effect.load})
            raise
        except (BrokenPipeError, ConnectionResetError):
            return LoadResult("the loader process ended", lost=True)
        finally:
            self._waiting.pop(effect.load, None)

    async def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
        if self._reader is not None:
            await self._reader

    async def _write(self, order: dict[str, Any]) -> None:
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                await self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._order_now(order)
        await self._process.stdin.drain()

    def _order_now(self, order: dict[str, Any]) -> None:
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(json.dumps(order).encode() + b"\n")

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "sidecar.backends.loader",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self._reader = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            result = json.loads(line)
            future = self._waiting.get(result["load"])
            if future is not None and not future.done():
                future.set_result(LoadResult(result["error"], result["lost"]))
        await process.wait()
        if self._process is process:
            logger.error("the loader process ended with code %s; it is started again", process.returncode)
            self._process = None
            for future in self._waiting.values():
                if not future.done():
                    future.set_result(LoadResult("the loader process ended", lost=True))


def _order(effect: Load, weights: Weights, target: Target, timeout_s: float) -> dict[str, Any]:
    return {
        "load": effect.load,
        "id": f"lora-sidecar-load-{effect.load}",
        "parameters": {"lora_name": effect.name},
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
