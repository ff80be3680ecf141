"""`make sim-faults`: a thousand worlds in which things go wrong. A failing seed is printed and runs alone.

`python -m tests.worlds ownership` runs those of `tests.worlds.ownership` instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from time import perf_counter

from sidecar.lab.sim.flavours import FLAVOURS
from tests.worlds.bounds import NAMES
from tests.worlds.ownership import command as ownership
from tests.worlds.seeds import run
from tests.worlds.trial import SeedFailed, Verdict

SEEDS = 1000
BATCH = 20
SHOWN = 3
"""The number of failing seeds printed in full; the others get one line."""
Outcome = Verdict | tuple[int, str]
"""A verdict, or a seed and why it failed."""


def _batch(seeds: list[int], flavour: str | None) -> list[Outcome]:
    return [_one(seed, flavour) for seed in seeds]


def _one(seed: int, flavour: str | None) -> Outcome:
    try:
        return run(seed, flavour)
    except SeedFailed as failure:
        return seed, str(failure)


def main() -> int:
    if sys.argv[1:2] == ["ownership"]:
        return ownership.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m tests.worlds", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--flavour", choices=list(FLAVOURS), help="engines of this one only")
    options = parser.parse_args()
    if options.seed is not None:
        return _alone(options.seed, options.flavour)
    seeds = range(options.first, options.first + options.seeds)
    batches = [list(seeds[at : at + BATCH]) for at in range(0, len(seeds), BATCH)]
    began = perf_counter()
    verdicts: list[Verdict] = []
    failures: list[tuple[int, str]] = []
    with ProcessPoolExecutor(options.jobs) as pool:
        for outcomes in pool.map(partial(_batch, flavour=options.flavour), batches):
            for outcome in outcomes:
                if isinstance(outcome, Verdict):
                    verdicts.append(outcome)
                else:
                    failures.append(outcome)
                    _tell(*outcome, options.flavour, in_full=len(failures) <= SHOWN)
            _progress(len(verdicts) + len(failures), len(seeds), len(failures))
    _summary(verdicts, failures, perf_counter() - began)
    return 1 if failures else 0


def _alone(seed: int, flavour: str | None) -> int:
    outcome = _one(seed, flavour)
    if isinstance(outcome, Verdict):
        print(outcome)
        return 0
    print(outcome[1])
    return 1


def _tell(seed: int, why: str, flavour: str | None, in_full: bool) -> None:
    print(f"\nFAILED seed {seed}; alone: make sim-faults SEED={seed}" + (f" FLAVOUR={flavour}" if flavour else ""))
    print(why if in_full else "\n".join(why.splitlines()[:2]), flush=True)


def _progress(done: int, total: int, failed: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:,} of {total:,} seeds, {failed} failed", end="" if done < total else "\n", file=sys.stderr)


def _summary(verdicts: list[Verdict], failures: list[tuple[int, str]], seconds: float) -> None:
    reasons: Counter[str] = Counter()
    voided: Counter[str] = Counter()
    for verdict in verdicts:
        reasons.update(verdict.reasons)
        voided.update(verdict.voided)
    requests, faults = sum(each.requests for each in verdicts), sum(each.faults for each in verdicts)
    nearest = max((each.nearest_to_bound for each in verdicts), default=0.0)
    print(
        f"{len(verdicts):,} seeds held and {len(failures)} failed in {seconds:.0f} s: {requests:,} requests, "
        f"{faults:,} faults, {sum(each.virtual_s for each in verdicts) / 3600:,.0f} hours of virtual time"
    )
    print("endings          ", ", ".join(f"{name} {count:,}" for name, count in reasons.most_common()))
    print(
        f"bounds            {sum(each.bounded for each in verdicts):,} kept, the nearest at {nearest:.2f} of its "
        f"bound; void: {', '.join(f'{name} {count:,}' for name, count in voided.most_common()) or 'none'}; exceeded "
        f"for a fault that had not been noticed yet: {sum(each.unnoticed for each in verdicts):,}"
    )
    _bounds(verdicts)
    if failures:
        print("failed            ", " ".join(str(seed) for seed, _ in failures))


def _bounds(verdicts: list[Verdict]) -> None:
    """Print how often each bound was reached in the worlds with small bounds; a bound never reached is not tested."""
    reached: Counter[str] = Counter(dict.fromkeys(NAMES, 0))
    for verdict in verdicts:
        reached.update(verdict.reached)
    print("bounds reached    " + "\n                  ".join(f"{name} {count:,}" for name, count in reached.items()))
    never = [name for name, count in reached.items() if not count]
    print(f"never reached     {', '.join(never) or 'none'}")


if __name__ == "__main__":
    sys.exit(main())
