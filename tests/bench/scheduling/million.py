"""A million requests, by the command line in a process of its own: how fast, and in how much memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from tests.bench.scheduling.claims import Claim, Reading
from tests.bench.scheduling.jobs import Job, Scale

ITEM = "11 a million requests"
REQUESTS = 1_000_000
MINUTES, MEMORY_MB = 30, 1000
OPTIONS = ("--workload", "zipf", "--input-tokens", "256", "--output-tokens", "128", "--adapters", "256")


def jobs(scale: Scale) -> Iterator[Job]:
    if not scale.quick:
        yield Job("zipf over 256 adapters, 4 backends", partial(simulated, REQUESTS, scale.seeds[0]), is_long=True)


def simulated(requests: int, seed: int) -> list[Reading]:
    """Return requests per second of the machine's time, and the peak memory of the process."""
    command = [
        sys.executable, "-m", "sidecar", "simulate", *OPTIONS, "--backends", "4", "--requests", str(requests),
        "--seed", str(seed), "--json",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{' '.join(command)} ended with {process.returncode}"
    return list(_readings(json.loads(printed), usage, requests, seed))


def _readings(record: dict[str, Any], usage: resource.struct_rusage, requests: int, seed: int) -> Iterator[Reading]:
    count, wall_s = f"{requests:,} requests", record["wall_s"]
    rate = Claim(item=ITEM, what=f"{count}: simulated in a second", unit="")
    yield Reading(claim=rate, seed=seed, value=requests / wall_s)
    of_processor = Claim(item=ITEM, what=f"{count}: simulated in a second of the processor", unit="")
    yield Reading(claim=of_processor, seed=seed, value=requests / (usage.ru_utime + usage.ru_stime))
    minutes = Claim(item=ITEM, what=f"{count}: minutes", unit="", at_most=MINUTES)
    yield Reading(claim=minutes, seed=seed, value=wall_s / 60)
    memory = Claim(item=ITEM, what=f"{count}: peak memory", unit="MB", at_most=MEMORY_MB)
    yield Reading(claim=memory, seed=seed, value=usage.ru_maxrss / 1e3)
    answered = Claim(item=ITEM, what=f"{count}: answered, of all", unit="", at_least=1.0)
    yield Reading(claim=answered, seed=seed, value=record["requests"]["answered"] / requests)
