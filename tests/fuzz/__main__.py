"""`make fuzz`: 100,000 damaged adapters, in all cores; the seed is printed and can be given."""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter

from tests.fuzz.adapters import Found, run

BATCH = 500
HANGS_AFTER_S = 60
SLOW_S = 5.0
MEMORY_EVERY = 50


def _batch(first: int, last: int, seed: int) -> Found:
    faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)  # a matcher that holds the interpreter stops no signal
    try:
        with tempfile.TemporaryDirectory(prefix="lora-sidecar-fuzz-") as folder:
            return run(range(first, last), seed, Path(folder), MEMORY_EVERY)
    finally:
        faulthandler.cancel_dump_traceback_later()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    began = perf_counter()
    total: Counter[str] = Counter()
    slowest, excess = (0.0, -1), -(1 << 40)
    starts = range(0, options.cases, BATCH)
    with ProcessPoolExecutor(options.jobs) as pool:
        batches = [pool.submit(_batch, at, min(at + BATCH, options.cases), options.seed) for at in starts]
        for batch in batches:
            found = batch.result()
            total.update(found.outcomes)
            slowest = max(slowest, (found.slowest_s, found.slowest_case))
            excess = max(excess, found.memory_excess_bytes)
    for outcome, count in sorted(total.items()):
        print(f"{count:8,} {outcome}")
    print(
        f"{options.cases:,} damaged adapters, seed {options.seed}, in {perf_counter() - began:.0f} s; slowest "
        f"{slowest[0]:.2f} s (case {slowest[1]}); memory beyond twice the files and 256 KiB: {max(0, excess):,} bytes"
    )
    return 1 if slowest[0] > SLOW_S or excess > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
