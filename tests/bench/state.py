"""100,000 registered names in a Redis: how long a replica takes to have them, and what they weigh in its memory.

Each is an adapter of rank 16 on all linear layers of an 8B model. Beside it stands the same registry in a SQLite file.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from time import perf_counter

from sidecar.core.facts import Adapter, Row
from sidecar.state.contents import Contents, SqliteFile
from sidecar.state.records import added, refreshed
from sidecar.state.redis.contents import RedisRegistryStore
from sidecar.state.registry import REGISTRY_FILE, Change, Registry, SqliteRegistry
from tests.bench.figures import Figure, middle
from tests.kit.redis_servers import Server, running
from tests.kit.registries import link_to, shared_registry

NAMES, LOGGED, WRITES, LAYERS = 100_000, 1000, 200, 32
MODULES = (
    ("attn_q", 1, 4096, 4096), ("attn_k", 2, 4096, 1024), ("attn_v", 3, 4096, 1024), ("attn_dense", 4, 4096, 4096),
    ("mlp_h_to_4h", 5, 4096, 14336), ("mlp_4h_to_h", 6, 14336, 4096), ("mlp_gate", 7, 4096, 14336),
)  # fmt: skip


async def bench(folder: Path) -> list[Figure]:
    """Fill a Redis and a file alike, have a process of its own load each, and then write with two replicas."""
    async with running(folder / "server") as server:
        contents = _contents()
        link = link_to(server.url)
        await RedisRegistryStore(link).write(contents)
        await link.close()
        await SqliteFile(folder / REGISTRY_FILE).write(contents)
        del contents
        shared, alone = await _load(server.url), await _load(str(folder / REGISTRY_FILE))
        stored = await _stored_bytes(server)
        write_ms = await _writes(server)
    name = f"state: {NAMES:,} names"
    return [
        Figure(f"{name}, loaded", shared["seconds"], "s", alone["seconds"], "from SQLite"),
        Figure(f"{name}, in memory", shared["bytes"], "bytes each", alone["bytes"], "from SQLite"),
        Figure(f"{name}, in Redis", stored, "bytes each"),
        Figure(f"{name}, a write that two replicas read", write_ms, "ms"),
    ]


def _contents() -> Contents:
    rows = tuple(Row(name, number, layer, 16, *io) for layer in range(LAYERS) for name, number, *io in MODULES)
    records = []
    for number in range(NAMES):
        adapter = Adapter(f"{number:064x}", "base", rows, "bfloat16")
        record, _ = added(None, f"team-{number % 97}/adapter-{number}", adapter, f"s3://adapters/{number}", now=1e9)
        records.append((number + 1, record))
    changes = tuple(Change(number, record.name, record) for number, record in records[-LOGGED:])
    return Contents(tuple(records), changes, NAMES)


async def _load(place: str) -> dict[str, float]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.state", place, stdout=asyncio.subprocess.PIPE
    )
    told, _ = await process.communicate()
    assert process.returncode == 0
    return {name: float(value) for name, value in json.loads(told).items()}


async def _stored_bytes(server: Server) -> float:
    async with server.client() as client:
        return int((await client.info("memory"))["used_memory"]) / NAMES


async def _writes(server: Server) -> float:
    """Return the middle of what writes take while another replica is a member that is waited for."""
    async with shared_registry(server.url, "one") as one, shared_registry(server.url, "two"):
        times = []
        for record in one.all()[:WRITES]:
            began = perf_counter()
            await one.put(refreshed(record, 1), record)
            times.append((perf_counter() - began) * 1e3)
        return middle(times)


async def _measure(place: str) -> None:
    """Load a registry in this process and print what that took."""
    before, began = _resident_bytes(), perf_counter()
    registry: Registry
    if "://" in place:
        async with shared_registry(place) as registry:
            _tell(registry, perf_counter() - began, before)
    else:
        registry = SqliteRegistry(Path(place))
        _tell(registry, perf_counter() - began, before)
        await registry.close()


def _tell(registry: Registry, seconds: float, before: int) -> None:
    each = (_resident_bytes() - before) / len(registry.all())
    print(json.dumps({"seconds": seconds, "bytes": each}))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    asyncio.run(_measure(sys.argv[1]))
