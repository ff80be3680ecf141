"""`make bench`: run the benches that are named, or all, and print one table. It judges, and never fails."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from time import perf_counter

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else each process that ends is told of between the lines

from tests.bench import (
    access,
    cold,
    command_line,
    core,
    eviction,
    idle,
    latency,
    miss,
    openai,
    packing,
    pool,
    rate,
    relay,
    replicas,
    restart,
    short,
    slow_readers,
    stall,
    state,
    traces,
    trainer,
    truth,
    usage,
    wire,
)
from tests.bench.figures import Figure, machine, print_table

BENCHES = {
    "access": access.bench,
    "cold": cold.bench,
    "core": core.bench,
    "command-line": command_line.bench,
    "eviction": eviction.bench,
    "idle": idle.bench,
    "relay": relay.bench,
    "short": short.bench,
    "rate": rate.bench,
    "latency": latency.bench,
    "miss": miss.bench,
    "openai": openai.bench,
    "wire": wire.bench,
    "stall": stall.bench,
    "slow-readers": slow_readers.bench,
    "state": state.bench,
    "packing": packing.bench,
    "pool": pool.bench,
    "replicas": replicas.bench,
    "restart": restart.bench,
    "traces": traces.bench,
    "trainer": trainer.bench,
    "truth": truth.bench,
    "usage": usage.bench,
}


async def run(names: list[str]) -> list[Figure]:
    figures: list[Figure] = []
    for name in names:
        began = perf_counter()
        print(f"{name} …", file=sys.stderr, end=" ", flush=True)
        with tempfile.TemporaryDirectory(prefix="lora-sidecar-bench-") as folder:
            figures += await BENCHES[name](Path(folder))
        print(f"{perf_counter() - began:.0f} s", file=sys.stderr)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"benches to run: {', '.join(BENCHES)}; default all")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHES]
    if unknown:
        parser.error(f"no bench is called {unknown[0]}; there are {', '.join(BENCHES)}")
    figures = asyncio.run(run(options.names or list(BENCHES)))
    if options.json:
        print(json.dumps({"machine": machine(), "figures": [figure.record() for figure in figures]}, indent=2))
    else:
        print_table(figures)


if __name__ == "__main__":
    main()
