"""The demo's engines: emulated ones in processes of their own."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from sidecar.errors import Misused, Reason
from sidecar.lab.demo.model import SEED

TIME_SCALE = 0.2
COST = "llama-3.1-8b/a100_sxm/trtllm"
"""The cost file of the emulated engines, which run five times as fast."""
PAGES = 3
"""Adapter pages of each engine; most of the demo's adapters take one."""
START_TIMEOUT_S = 30.0


@dataclass
class Engine:
    """One running emulated engine. `config` is the engine's config.json, `log` the log of served requests."""

    grpc: str
    metrics: str
    config: Path
    log: Path
    process: asyncio.subprocess.Process = field(repr=False)

    async def stop(self) -> None:
        with suppress(ProcessLookupError):
            self.process.terminate()
        await self.process.wait()

    def served(self) -> list[dict[str, object]]:
        """Return a record for each request that has ended here."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


async def start_engine(folder: Path, number: int) -> Engine:
    """Start an engine on free ports. Raises Misused if it does not come up."""
    config, log = folder / f"engine-{number}.json", folder / f"served-{number}.jsonl"
    log.touch()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar.lab.engine", "--json", "--grpc-port", "0", "--metrics-port", "0",
        "--seed", str(SEED), "--lora-host-pages", str(PAGES), "--lora-device-pages", str(PAGES),
        "--time-scale", str(TIME_SCALE), "--write-engine-config", str(config), "--served-log", str(log),
        stdout=asyncio.subprocess.PIPE, start_new_session=True,  # Ctrl-C is the demo's, which ends its engines
    )  # fmt: skip
    assert process.stdout is not None
    async with asyncio.timeout(START_TIMEOUT_S):
        line = await process.stdout.readline()
    if not line:
        raise Misused(Reason.BACKEND_UNREACHABLE, f"emulated engine {number} ended with {await process.wait()}")
    ready = json.loads(line)
    return Engine(ready["grpc"], ready["metrics"], config, log, process)
