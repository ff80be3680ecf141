"""`make bench-scheduling`: every claim about order, placement, admission and the store, in one run and one table.

It judges, and never fails. The bare engine stands beside, on the same arrivals.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from types import ModuleType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tests.bench.scheduling import (
    deep,
    harmless,
    kinds,
    lost_backend,
    million,
    overload,
    pool,
    recorded,
    stores,
    tenants,
    two_hot,
    varied,
)
from tests.bench.scheduling.claims import Reading, Row, rows_of
from tests.bench.scheduling.jobs import Job, Scale
from tests.bench.scheduling.tables import markdown, print_table

PROCESSES = 2
ITEMS: dict[int, tuple[ModuleType, ...]] = {
    2: (deep, harmless),
    3: (varied,),
    4: (two_hot,),
    5: (overload,),
    6: (pool, lost_backend),
    7: (tenants,),
    8: (stores,),
    11: (million,),
    12: (kinds,),
}
Told = Callable[[str], None]


def main() -> None:
    options = _parser().parse_args()
    scale = Scale((1,), quick=True) if options.quick else Scale()
    items = options.only or list(ITEMS)
    jobs = [job for item in items for job in _jobs(item, scale, options.clients, options.traces)]
    began_s = perf_counter()
    rows = rows_of(_readings(jobs, options.processes))
    told = f"{len(jobs)} jobs in {perf_counter() - began_s:.0f} s, seeds {', '.join(map(str, scale.seeds))}"
    if options.json:
        print(json.dumps({"ran": told, "claims": [row.record() for row in rows]}, indent=2))
    else:
        print_table(rows, told)
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    _tell_the_missed(rows)


def _jobs(item: int, scale: Scale, clients: list[Path], traces: list[Path]) -> Iterator[Job]:
    for module in ITEMS[item]:
        yield from module.jobs(scale)
        if module is stores:
            for path in clients:
                yield from stores.recorded_jobs(path, scale)
        if module is kinds:
            for path in traces:
                yield from recorded.recorded_jobs(path, scale)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scheduling", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed and a quarter of the requests")
    parser.add_argument("--only", type=int, action="append", choices=list(ITEMS), help="this item; again for more")
    parser.add_argument("--json", action="store_true", help="print the claims as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument(
        "--clients",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="CSV of clients' recorded rates and spreads, for the store to be tried on too",
    )
    parser.add_argument(
        "--traces",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="CSV of Azure's LLM inference traces, for every kind of engine to be tried on too",
    )
    return parser


def _readings(jobs: list[Job], processes: int) -> list[Reading]:
    """Run the jobs, those that take longest first, and return what they measured in the jobs' own order."""
    found: dict[int, list[Reading]] = {}
    with ProcessPoolExecutor(processes, get_context("spawn")) as workers, _telling(len(jobs)) as told:
        numbered = sorted(enumerate(jobs), key=lambda each: not each[1].is_long)
        running = {workers.submit(job.run): (number, job.label) for number, job in numbered}
        for future in as_completed(running):
            number, label = running[future]
            found[number] = future.result()
            told(label)
    return [reading for number in range(len(jobs)) for reading in found[number]]


@contextmanager
def _telling(total: int) -> Iterator[Told]:
    """Give what says on stderr how far it is: a bar for whoever looks on, else a line for each tenth."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield _by_tenths(total)
        return
    columns = BarColumn(), TextColumn("{task.completed} of {task.total}  {task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda label: progress.update(task, advance=1, description=label)


def _by_tenths(total: int) -> Told:
    done, began_s = 0, perf_counter()

    def told(label: str) -> None:
        nonlocal done
        done += 1
        if done * 10 // total > (done - 1) * 10 // total:
            print(f"{done} of {total} after {perf_counter() - began_s:.0f} s: {label}", file=sys.stderr, flush=True)

    return told


def _tell_the_missed(rows: list[Row]) -> None:
    missed = [row for row in rows if row.is_met is False]
    for row in missed:
        print(f"not met: {row.claim.item}, {row.claim.what}", file=sys.stderr)


if __name__ == "__main__":
    main()
