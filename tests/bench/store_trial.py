"""Miss cost of every eviction policy over the bound: `python -m tests.bench.store_trial [REQUESTS [SEED [FILE…]]]`.

A file holds clients' recorded rates and spreads, a client standing for an adapter; see `store_traces.of_clients`.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from tests.worlds.store_traces import GENERATORS, of_clients
from tests.worlds.store_trial import table

DAY = slice(600, 744)
"""Windows of ten minutes."""


def main(requests: int, seed: int, files: list[Path]) -> None:
    """Print the table for the generators and for the recorded clients in each file, in all and on one day."""
    traces = {name: partial(make, requests, seed) for name, make in GENERATORS.items()}
    for file in files:
        traces[f"{file.name[:20]}, all"] = partial(of_clients, file, requests, seed)
        traces[f"{file.name[:20]}, a day"] = partial(of_clients, file, requests, seed, DAY)
    for line in table(traces):
        print(line, flush=True)


if __name__ == "__main__":
    requests, seed, *files = [*sys.argv[1:], *("20000", "1")[len(sys.argv) - 1 :]]
    main(int(requests), int(seed), [Path(file) for file in files])
