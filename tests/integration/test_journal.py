"""The journal of a served workload: each segment that is kept replays to the same bytes, whatever the hash seed."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from pathlib import Path

from sidecar.journal.segments import segment_paths
from tests.kit.emulated import running_engine
from tests.kit.serving import serving, write_adapters

PROGRAM = (
    "import sys; from pathlib import Path; from sidecar.journal.replay import run; "
    "sys.exit(run(Path(sys.argv[1]), True, False, print, lambda line: print(line, file=sys.stderr)))"
)


def replayed(path: Path, hash_seed: str) -> bytes:
    """Return the effects that a replay prints in a process of its own; it must find no difference."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], env=environment, capture_output=True, timeout=120
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


async def serve(adapters: Path, data: Path, requests: int) -> None:
    """Serve a random order of 16 adapters through an engine cache of four, with a small journal."""
    names = write_adapters(adapters, 16)
    async with (
        running_engine(compute="none", shape="tiny", lora_host_pages=4, lora_device_pages=4) as engine,
        serving([engine], adapters, data_directory=str(data), journal={"segment_bytes": 1 << 15, "segments_max": 3})
        as served,
    ):  # fmt: skip
        order = random.Random(3).choices(names, k=requests)
        limit = asyncio.Semaphore(40)

        async def one(name: str) -> None:
            async with limit:
                answer = await served.ask(name, 4)
            assert answer.tokens == served.expected(name, 4)

        await asyncio.gather(*(one(name) for name in order))


async def test_the_segments_of_a_served_workload_replay(tmp_path: Path) -> None:
    """All that is kept of a rotated journal gives the same effects under two hash seeds, byte for byte."""
    await serve(tmp_path / "adapters", tmp_path / "data", 300)
    segments = segment_paths(tmp_path / "data" / "journal")
    assert len(segments) == 3
    outputs = [replayed(tmp_path / "data", seed) for seed in ("0", "1")]
    assert outputs[0].count(b"\n") > 100
    assert outputs[1] == outputs[0]
    assert segments[0].name != "segment-000000001.jsonl"
    assert outputs[0].endswith(replayed(segments[-1], "2"))
