"""Every kind of engine on recorded arrivals and lengths, with adapters drawn for them: public traces name none.

A trace is a CSV file with the columns of Azure's LLM inference traces: TIMESTAMP,ContextTokens,GeneratedTokens.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from tests.bench.scheduling.claims import Reading
from tests.bench.scheduling.jobs import Job, Scale
from tests.bench.scheduling.kinds import KINDS, compared

REQUESTS = 2560
PROMPT_TOKENS_MAX = 8000
"""Longer prompts are cut: simulated engines read a prompt in one step, of 8,192 tokens at most."""
POOL: dict[str, Any] = {"backends": 2, "slots": 8}
ADAPTERS = 64


def recorded_jobs(path: Path, scale: Scale) -> Iterator[Job]:
    """Yield a job for each kind of engine and seed; a seed draws the adapters."""
    for kind in KINDS:
        for seed in scale.seeds:
            label = f"{kind}, {path.stem}, seed {seed}"
            yield Job(label, partial(replayed, kind, path, scale.requests(REQUESTS), seed))


def replayed(kind: str, path: Path, requests: int, seed: int) -> list[Reading]:
    """Return one kind's figures for the first requests of a trace."""
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.csv"
        _write(trace, path, requests, seed)
        return compared(kind, f"{path.stem}, 64 adapters by Zipf, 2 engines of 8 slots", seed, trace=trace, **POOL)


def _write(trace: Path, path: Path, requests: int, seed: int) -> None:
    """Write a trace as the simulator reads it."""
    adapters = [f"a{number:02}" for number in range(ADAPTERS)]
    random, shares = Random(seed), [1 / (rank + 1) for rank in range(ADAPTERS)]
    with path.open(newline="") as source, trace.open("w", newline="") as target:
        write = csv.writer(target)
        write.writerow(("arrival_s", "adapter", "input_tokens", "output_tokens"))
        began: datetime | None = None
        for row in islice(csv.DictReader(source), requests):
            at = datetime.fromisoformat(row["TIMESTAMP"][:26])
            began = began or at
            tokens = min(PROMPT_TOKENS_MAX, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"]))
            write.writerow(((at - began).total_seconds(), random.choices(adapters, shares)[0], *tokens))
