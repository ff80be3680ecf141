"""A thousand worlds in which members, Redis and the network fail. A failing seed is printed and runs alone."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from time import perf_counter

from tests.worlds.ownership.checks import HOLE, HOLE_WRITES, LATE_WRITES
from tests.worlds.ownership.trial import SeedFailed, Verdict, run_seed

PROGRAM = "python -m tests.worlds ownership"
SEEDS = 1000
SHOWN = 3
"""So many failing seeds are told in full; of the others one line."""


def one(seed: int) -> Verdict | tuple[int, str]:
    try:
        return run_seed(seed)
    except SeedFailed as failure:
        return seed, str(failure)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    if options.seed is not None:
        outcome = one(options.seed)
        print(outcome if isinstance(outcome, Verdict) else outcome[1])
        return 0 if isinstance(outcome, Verdict) else 1
    began = perf_counter()
    held: list[Verdict] = []
    failed: list[int] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(one, range(options.first, options.first + options.seeds), chunksize=10):
            if isinstance(outcome, Verdict):
                held.append(outcome)
            else:
                failed.append(outcome[0])
                print(f"\nFAILED seed {outcome[0]}; alone: {PROGRAM} --seed {outcome[0]}")
                print(outcome[1] if len(failed) <= SHOWN else outcome[1].splitlines()[0], flush=True)
    _summary(held, failed, perf_counter() - began)
    return 1 if failed else 0


def _summary(held: Sequence[Verdict], failed: Sequence[int], seconds: float) -> None:
    counts = sum((each.counts for each in held), Counter[str]())
    print(f"{len(held):,} seeds held and {len(failed)} failed in {seconds:.0f} s")
    print(f"slowest owner in peace: {max((each.slowest for each in held), default=0.0):.2f} of its bound")
    with_hole = [each for each in held if each.counts[HOLE]]
    print(
        f"requests under an older epoch than engines had been sent: {counts[LATE_WRITES]} of processes stopped after "
        f"the check, {counts[HOLE_WRITES]} in {len(with_hole)} worlds with the known hole; any other fails its seed"
    )
    print("of these worlds, grants beside a stray, and writes under an older epoch:")
    for each in with_hole:
        print(f"  seed {each.seed}: {each.counts[HOLE]}, {each.counts[HOLE_WRITES]}")
    print(", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())))
    if failed:
        print("failed", " ".join(str(seed) for seed in failed))
