"""`make chaos`: every scenario in a pool of its own, one line each. A failing one keeps its folder."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else each process that ends is told of between the lines

from grpc.aio import AioRpcError

from tests.chaos.away import SHARE_MIN, away
from tests.chaos.pool import chaos_pool
from tests.chaos.scenarios import SCENARIOS, Scenario
from tests.chaos.trial import BACK_S, CALM_S, SHOWN, Verdict, trial

COLUMNS = ("full", "refused", "unreached", "broken", "cut", "failed", "silent", "wrong", "doubled")


async def run(scenario: Scenario, calm_s: float, seed: int, has_envoy: bool) -> bool:
    """Run one scenario, print its line and return whether all is well."""
    folder = Path(tempfile.mkdtemp(prefix="lora-sidecar-chaos-"))
    try:
        async with chaos_pool(folder, scenario.sentinel, has_envoy=has_envoy) as pool:
            verdict = await trial(pool, scenario, calm_s, seed)
    except (AssertionError, TimeoutError, RuntimeError, OSError, AioRpcError):
        print(f"{scenario.name:<32}{traceback.format_exc()}  its processes' logs: {folder}", flush=True)
        return False
    _tell(verdict)
    if verdict.wrong:
        print(f"  its processes' logs: {folder}")
    else:
        shutil.rmtree(folder)
    return not verdict.wrong and not verdict.is_late


async def run_away(away_s: float) -> int:
    """Print what of the throughput is left while Redis is away; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="lora-sidecar-chaos-") as name:
        async with chaos_pool(Path(name)) as pool:
            told = await away(pool, Path(name), min(60.0, away_s / 2), away_s)
    print(
        f"answers a second: {told.with_redis:.1f} with Redis, {told.without:.1f} in {away_s:g} s without: "
        f"{told.share:.3f} of it, goal {SHARE_MIN} or more"
    )
    for refusal, times in told.refusals.items():
        print(f"  {times} times, to who registers: {refusal}")
    for line in told.wrong[:SHOWN]:
        print(f"  {line}")
    return 1 if told.wrong else 0


def _tell(verdict: Verdict) -> None:
    counts = "".join(f"{verdict.endings[column]:>10}" for column in COLUMNS)
    late = " LATE" if verdict.is_late else ""
    print(
        f"{verdict.scenario:<32}{counts}{verdict.stale:>10}{verdict.back_s:>10.1f}{verdict.slowest_s:>10.1f}{late}",
        flush=True,
    )
    for line in verdict.wrong[:SHOWN]:
        print(f"  {line}")
    if len(verdict.wrong) > SHOWN:
        print(f"  and {len(verdict.wrong) - SHOWN} more")


async def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--only", action="append", help=", ".join(each.name for each in SCENARIOS))
    parser.add_argument("--seconds", type=float, default=CALM_S, help="of load before and after what is done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lane", choices=("in-path", "envoy"), default="in-path", help="envoy: clients ask an Envoy")
    parser.add_argument("--away", type=float, metavar="SECONDS", help="only take Redis away for so long")
    options = parser.parse_args()
    if options.away is not None:
        return await run_away(options.away)
    unknown = set(options.only or ()) - {each.name for each in SCENARIOS}
    if unknown:
        parser.error(f"no scenario is called {min(unknown)}")
    head = "".join(f"{column:>10}" for column in (*COLUMNS, "stale", "back s", "slowest"))
    print(f"{'':32}{head}  back within {BACK_S:g} s")
    wanted = [each for each in SCENARIOS if not options.only or each.name in options.only]
    well = [await run(each, options.seconds, options.seed, options.lane == "envoy") for each in wanted]
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
