"""How long a sidecar takes to be ready with 500 adapters registered and 500 blobs, 20 GB of them, on its disk tier."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from sidecar.adapters.builder import build
from sidecar.adapters.disk import SUFFIX, DiskTier
from sidecar.adapters.layout import Layout
from sidecar.adapters.registration import read_registration
from sidecar.core.facts import packed_key
from sidecar.state.records import added
from sidecar.state.registry import SqliteRegistry, lock_data_directory
from tests.bench.figures import Figure, middle
from tests.kit.peft_files import write_adapter

BLOBS, BLOB_BYTES = 500, 40_000_000
ROUNDS = 5
FREE = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--http", "127.0.0.1:0", "--json")


async def bench(folder: Path) -> list[Figure]:
    """Start `sidecar serve` over a full data directory and over an empty one, in turns."""
    full, empty = folder / "full", folder / "empty"
    await _fill(folder, full)
    times: dict[Path, list[float]] = {full: [], empty: []}
    for _ in range(ROUNDS):
        for data in (full, empty):
            times[data].append(await _start(data))
    note = f"an empty data directory; {BLOBS} blobs of {BLOB_BYTES // 1_000_000} MB, sparse"
    return [Figure("restart: ready", middle(times[full]), "s", middle(times[empty]), note, "value", 2.0)]


async def _fill(folder: Path, data: Path) -> None:
    """Register 500 versions and write a sparse blob for each, with the tail of a real one."""
    path = write_adapter(folder / "adapter")
    adapter = read_registration("adapter", path).adapter
    tier = DiskTier(data / "blobs")
    tier.scan()
    built = build(path, Layout("float16"))
    tier.write("real", built)
    real = data / "blobs" / f"real{SUFFIX}"
    tail = real.read_bytes()[built.blob.size_bytes :]
    real.unlink()
    built.blob.release()
    lock_data_directory(data).close()
    registry = SqliteRegistry(data / "registry.sqlite")
    for number in range(BLOBS):
        digest = f"{number:064x}"
        record, _ = added(None, f"a{number}", replace(adapter, digest=digest), str(path), now=0.0)
        await registry.put(record, None)
        with (data / "blobs" / f"{packed_key(digest, Layout('float16'))}{SUFFIX}").open("wb") as file:
            file.truncate(BLOB_BYTES)
            file.seek(BLOB_BYTES)
            file.write(tail)
    await registry.close()


async def _start(data: Path) -> float:
    """Return the seconds until the ready line."""
    began = perf_counter()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "serve", "--data-directory", str(data), *FREE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    json.loads(await process.stdout.readline())
    took = perf_counter() - began
    process.terminate()
    await process.wait()
    return took
