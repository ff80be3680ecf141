"""`make soak`: a pool of replicas and engines that everything happens to at once, for as long as is wanted.

Every answer is checked against the adapter that was named. Exit 0 where none was wrong or lost and neither memory nor
open files grew.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from time import monotonic

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else every noise and each process that ends is told of

from sidecar.tasks import ended
from tests.chaos.load import BROKEN, CUT, FULL, REFUSED, UNREACHABLE, Load, Try
from tests.chaos.pool import ChaosPool, chaos_pool
from tests.soak.crowd import Crowd
from tests.soak.deeds import DEEDS
from tests.soak.watching import MIB, Life, Watch, slope_a_minute

ENGINES = 4
ALLOWED = (FULL, REFUSED, UNREACHABLE, BROKEN, CUT)
"""Endings that a killed process may give its clients; whatever else there is is wrong or lost."""
PAUSE_S = (3.0, 12.0)
"""Between two deeds; one in three is two at once."""
SLOPE_MIB_MAX = 1.0
"""What may be added to a process's memory in a minute, after the warm-up."""
FILES_MAX = 10
"""How many more files may be open at the end than after the warm-up: connections come and go."""
RATE, LOST_S = 6.0, 300.0
"""Requests a second beside all else; after so long without an ending one is taken for lost. A burst behind a killed
engine waits for long on two cores, and a wait is not a loss."""
WARM_SHARE = 0.2
LOOKS_MIN = 120
"""A life with fewer looks after the warm-up says nothing of growth."""
TOLD_EVERY_S = 60.0


async def soak(minutes: float, seed: int, folder: Path) -> bool:
    """Run it, print what was seen and return whether all is well."""
    done: Counter[str] = Counter()
    async with chaos_pool(folder, engine_count=ENGINES) as pool:
        watch = Watch(pool.replicas)
        watching = asyncio.create_task(watch.run())
        async with Load(pool, seed, RATE, LOST_S) as load:
            crowd = Crowd(load, folder / "visitors", seed)
            coming = asyncio.create_task(crowd.run())
            await _disturb(pool, load, crowd, done, minutes, Random(seed))
            await ended(coming)
            assert coming.cancelled()
            await load.stop()
            await pool.until_settled(pool.replicas)
        await ended(watching)
        stale = sum(log.stale() for log in pool.logs)
        print(f"done to it: {', '.join(f'{count} times {name}' for name, count in sorted(done.items()))}")
        print(f"came and went: {crowd.visits} adapters, {crowd.noises} times noise; stale dispatches {stale}")
        return _judged(load) & _flat(watch, minutes)


async def _disturb(
    pool: ChaosPool, load: Load, crowd: Crowd, done: Counter[str], minutes: float, random: Random
) -> None:
    """Do one or two things at a time, until the time is over; each is whole again before the next."""
    ends_s, told_s = monotonic() + 60 * minutes, monotonic()
    while monotonic() < ends_s:
        await asyncio.sleep(random.uniform(*PAUSE_S))
        deeds = random.sample(DEEDS, 1 + (random.random() < 1 / 3))
        await asyncio.gather(*(deed(pool, random) for _, deed in deeds))
        await pool.until_settled(pool.replicas)
        done.update(name for name, _ in deeds)
        if monotonic() - told_s > TOLD_EVERY_S:
            told_s = monotonic()
            endings = Counter(each.ending for each in load.tries)
            print(f"  {(ends_s - told_s) / 60:4.1f} minutes left: {dict(endings)}, {crowd.visits} visits", flush=True)


def _judged(load: Load) -> bool:
    endings = Counter(each.ending for each in load.tries)
    wrong = [each for each in load.tries if each.ending not in ALLOWED]
    print(f"requests: {len(load.tries)} tries, {', '.join(f'{count} {name}' for name, count in endings.most_common())}")
    print(f"wrong or lost: {len(wrong)}; refused at every try: {load.given_up}; goal 0 and 0")
    for each in wrong[:10]:
        print(f"  {_line(each)}")
    return not wrong and not load.given_up


def _line(each: Try) -> str:
    lasted_s = each.ended_s - each.begun_s
    return f"{each.ending}: {each.adapter} at {each.replica}, {each.tokens} tokens in {lasted_s:.1f} s: {each.why}"


def _flat(watch: Watch, minutes: float) -> bool:
    """Print each process that lived long enough, and return whether none of them grows."""
    warm_s, is_flat, seen = min(120.0, WARM_SHARE * 60 * minutes), True, 0
    for life in watch.lives.values():
        rows = life.after(warm_s)
        if len(rows) < min(LOOKS_MIN, 20 * minutes):
            continue
        seen += 1
        is_flat &= _told(life, rows)
    print(
        f"{seen} of {len(watch.lives)} processes lived for long enough to be judged, {warm_s:.0f} s after their start"
    )
    return is_flat and seen > 0


def _told(life: Life, rows: list[tuple[float, int, int]]) -> bool:
    memory = slope_a_minute([(t, bytes_ / MIB) for t, bytes_, _ in rows])
    tenth = max(1, len(rows) // 10)
    first, last = (sum(count for _, _, count in part) / tenth for part in (rows[:tenth], rows[-tenth:]))
    print(
        f"{life.replica} (process {life.pid}, {rows[-1][0] / 60:.1f} min): memory {rows[0][1] / MIB:.1f} → "
        f"{rows[-1][1] / MIB:.1f} MiB, {memory:+.2f} MiB a minute, goal {SLOPE_MIB_MAX:g} or less; "
        f"open files {first:.0f} → {last:.0f}, goal {FILES_MAX} more or less"
    )
    return memory <= SLOPE_MIB_MAX and last <= first + FILES_MAX


async def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lora-sidecar-soak-"))
    print(f"{options.minutes:g} minutes, seed {options.seed}; a request is lost after {LOST_S:g} s", flush=True)
    if await soak(options.minutes, options.seed, folder):
        shutil.rmtree(folder)
        return 0
    print(f"  its processes' logs: {folder}")
    return 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
