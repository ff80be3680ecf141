"""`make fuzz-wire`: a million messages, good and odd, to every front of sidecars before emulated engines."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter

from tests.fuzz.wire.run import Found, run, summed

CPU_S_MAX = 0.25
GROWTH_BYTES_MAX = 64 << 20
SHOWN_MAX = 20


def _part(first: int, last: int, seed: int) -> Found:
    with tempfile.TemporaryDirectory(prefix="lora-sidecar-wire-") as folder:
        return asyncio.run(run(range(first, last), seed, Path(folder)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.wire", description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case, to see one again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    began = perf_counter()
    starts = [options.first + options.messages * job // options.jobs for job in range(options.jobs + 1)]
    with ProcessPoolExecutor(options.jobs) as pool:
        parts = [pool.submit(_part, *edges, options.seed) for edges in itertools.pairwise(starts)]
        found = summed(part.result() for part in parts)
    for outcome, count in sorted(found.outcomes.items()):
        print(f"{count:9,} {outcome}")
    for what in (*found.lies[:SHOWN_MAX], *found.crashes[:SHOWN_MAX]):
        print(what)
    start_bytes, end_bytes = found.memory_bytes
    took_s = perf_counter() - began
    print(
        f"{options.messages:,} messages, seed {options.seed}, in {took_s:.0f} s ({options.messages / took_s:.0f} a "
        f"second): {len(found.lies)} under another adapter than told, {len(found.crashes)} crashes, at most "
        f"{found.slowest_s * 1000:.0f} ms of CPU at once on the event loop; memory of a process {start_bytes >> 20} "
        f"MiB after a tenth, {end_bytes >> 20} MiB at the end"
    )
    grown = end_bytes - start_bytes > GROWTH_BYTES_MAX
    return 1 if found.lies or found.crashes or found.slowest_s > CPU_S_MAX or grown else 0


if __name__ == "__main__":
    sys.exit(main())
