"""`sidecar simulate`: simulate a pool under a load in virtual time, with the core that runs in production."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from policies.registry import POLICIES
from sidecar.cli.exits import CommandError, Exit
from sidecar.cli.load_options import (
    Adapters,
    ArrivalVariation,
    Cost,
    Drift,
    Gpu,
    InFlight,
    InputTokens,
    InputVariation,
    MaxTokens,
    Model,
    OutputTokens,
    OutputVariation,
    Ranks,
    Rate,
    Seats,
    Skew,
    Tenants,
    Workload,
    of_engines,
    of_load,
    panel,
)
from sidecar.cli.show import AsJson, JournalPolicies, console, print_json
from sidecar.errors import Misused, Reason
from sidecar.lab.sim.flavours import FLAVOURS
from sidecar.lab.sim.option_values import listed, names_listed
from sidecar.lab.sim.options import BARE, LORA_MODULES, Options
from sidecar.lab.sim.results import Result
from sidecar.lab.sim.runs import Run, runs_of
from sidecar.lab.sim.setup import Sidecar
from sidecar.lab.sim.simulate import simulate as run_simulation
from sidecar.lab.sim.tables import Figures, meaning, over, tables, title

Beginning = Callable[[str, int], Callable[[int], None] | None]
"""Takes a run's label and its number of requests; returns a callback that takes the number of ended ones, or None."""


def _names(kind: str) -> str:
    return ", ".join(sorted(POLICIES[kind]))


_sidecar, _output = panel("Sidecar"), panel("What to run and show")


def simulate(
    workload: Workload = None,
    trace: Annotated[
        Path | None,
        of_load(
            "CSV of arrival_s, adapter, input_tokens, output_tokens and perhaps tenant, gzip too, instead of a "
            "workload."
        ),
    ] = None,
    journal: Annotated[
        Path | None, of_load("A live run's journal, data directory or incident, to repeat its load.")
    ] = None,
    adapters: Adapters = None,
    requests: Annotated[int | None, of_load("Requests in all.", "1024; all of a trace")] = None,
    in_flight: InFlight = None,
    rate: Rate = None,
    load: Annotated[
        float | None,
        of_load(
            "The rate as a share of capacity: of the tokens/s of the engines if every adapter had a slot and the "
            "backlog were endless, divided by the tokens of an answer."
        ),
    ] = None,
    arrival_cv: ArrivalVariation = None,
    input_tokens: InputTokens = None,
    output_tokens: OutputTokens = None,
    input_cv: InputVariation = None,
    output_cv: OutputVariation = None,
    max_tokens: MaxTokens = None,
    skew: Skew = None,
    drift: Drift = None,
    tenants: Tenants = None,
    seed: Annotated[int | None, of_load("Seed of everything random.", "1")] = None,
    seeds: Annotated[str | None, of_load("Several seeds, run one after the other: 1,2,3.")] = None,
    engine: Annotated[str | None, of_engines(f"{', '.join(FLAVOURS)}.", "trtllm_no_evict")] = None,
    model: Model = None,
    gpu: Gpu = None,
    cost: Cost = None,
    backends: Annotated[int | None, of_engines("Engines, all alike.", "1")] = None,
    slots: Annotated[
        int | None, of_engines("Adapters that fit the GPU of each; vLLM keeps room for all linear layers.", "8")
    ] = None,
    host_slots: Annotated[int | None, of_engines("Adapters that fit the host cache of each.", "1024")] = None,
    seats: Seats = None,
    rank: Annotated[
        int | None, of_engines("Rank of the adapters, and the engine's maximum.", "16; the largest of --ranks")
    ] = None,
    ranks: Ranks = None,
    lora_modules: Annotated[
        str | None,
        of_engines(f"What adapters change: {', '.join(LORA_MODULES)} (as qv, at the base model's step times).", "qv"),
    ] = None,
    load_ms: Annotated[
        float | None,
        of_engines("For how long reading an adapter stops an engine that reads them itself, in ms.", "200"),
    ] = None,
    order: Annotated[
        str | None, _sidecar(f"{_names('ordering')}, or {BARE}: the bare engine.", Sidecar.ordering, "--ordering")
    ] = None,
    compare: Annotated[str | None, _sidecar(f"Several orders on the same arrivals, side by side: {BARE},skip.")] = None,
    route: Annotated[str | None, _sidecar(f"{_names('routing')}.", Sidecar.routing, "--routing")] = None,
    store: Annotated[
        str | None, _sidecar(f"Eviction from the store: {_names('eviction')}.", Sidecar.eviction, "--eviction")
    ] = None,
    store_bytes: Annotated[int | None, _sidecar("Size of the store.", str(Sidecar.store_bytes))] = None,
    prefetch: Annotated[str | None, _sidecar(f"{_names('prefetch')}.", Sidecar.prefetch)] = None,
    wait_limit: Annotated[
        float | None,
        _sidecar("Longest wait in seconds; longer ones are refused.", "600; a closed loop: for ever"),
    ] = None,
    patience: Annotated[
        float | None, _sidecar("Seconds that a request waits before others are held back for it.", "20")
    ] = None,
    policy: JournalPolicies = None,
    report: Annotated[Path | None, _output("Write a page with plots into this directory; needs the extra lab.")] = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a pool of engines and the sidecar in front of it in virtual time: throughput, waits and bounds.

    The defaults repeat SqueezeBits' measurement: Llama-3.1-8B on an A100, 64 adapters in turn, 1,024 tokens in and out,
    256 seats, 256 requests in flight. The core and its policies are those that serve; the engine is the emulated one.
    """
    options = Options(
        workload=workload, trace=trace, journal=journal, adapters=adapters, requests=requests, in_flight=in_flight,
        rate=rate, load=load, arrival_cv=arrival_cv, input_tokens=input_tokens, output_tokens=output_tokens,
        input_cv=input_cv, output_cv=output_cv, max_tokens=max_tokens, skew=skew, drift=drift,
        tenants=listed("tenants", tenants, float), seeds=_seeds(seed, seeds), engine=engine, model=model, gpu=gpu,
        cost=cost, backends=backends, slots=slots, host_slots=host_slots, seats=seats, rank=rank,
        ranks=listed("ranks", ranks, int), lora_modules=lora_modules, load_ms=load_ms, order=order,
        compare=names_listed("compare", compare), route=route, store=store, store_bytes=store_bytes,
        prefetch=prefetch, wait_limit=wait_limit, patience=patience,
    )  # fmt: skip
    write = None if report is None else _writing(report)
    runs, live = _runs(options, journal, policy or [])
    results = _results(runs)
    _show(_figures(results, live), live, as_json)
    if report is not None and write is not None:
        written = write(results, report)
        if not as_json:
            console().print(Text(f"The plots: {written}"))


def _writing(directory: Path) -> Callable[[Sequence[Result], Path], Path]:
    """Return a function that writes a report. Raises Misused, before any simulation, if none could be written."""
    if directory.exists() and not directory.is_dir():
        raise Misused(Reason.CONFIG_INVALID, f"--report {directory}: expected a directory, and it is a file")
    from sidecar.lab.sim.report import write_report

    return write_report


def _runs(options: Options, journal: Path | None, policies: list[str]) -> tuple[Sequence[Run], Figures | None]:
    """Return the runs to simulate, and the figures of the live run, if a journal is given."""
    if journal is None:
        if policies:
            raise CommandError("--policy allows what a journal names; give it with --journal", Exit.MISUSED)
        return list(runs_of(options)), None
    from sidecar.cli.journaled import journaled

    return journaled(options, journal, policies)


def _seeds(seed: int | None, seeds: str | None) -> tuple[int, ...] | None:
    if seed is not None and seeds is not None:
        raise Misused(Reason.CONFIG_INVALID, "--seed and --seeds exclude each other: --seeds takes several")
    return (seed,) if seed is not None else listed("seeds", seeds, int)


def _results(runs: Sequence[Run]) -> list[Result]:
    results = []
    with _progress_bars() as beginning:
        for run in runs:
            ended = beginning(f"{run.label}, seed {run.workload.seed}", run.workload.requests)
            result = run_simulation(run.setup, run.workload, run.label, ended)
            result.notes.extend(run.notes)
            results.append(result)
    return results


def _figures(results: Sequence[Result], live: Figures | None) -> list[Figures]:
    """Return the JSON objects, each compared with the bare engine and with the live run, if there is one."""
    figures = [result.as_json() for result in results]
    bare = {each["seed"]: each for each in figures if each["label"] == BARE}
    for each in figures:
        if each["label"] != BARE and each["seed"] in bare:
            each["over_bare"] = over(each, bare[each["seed"]])
        if live is not None:
            each["over_live"] = over(each, live)
    return figures


def _show(figures: list[Figures], live: Figures | None, as_json: bool) -> None:
    if as_json:
        with_live = {} if live is None else {"live": live}
        print_json({**(figures[0] if len(figures) == 1 else {"runs": figures}), **with_live})
        return
    screen = console()
    for seed in dict.fromkeys(each["seed"] for each in figures):
        of_seed = [each for each in figures if each["seed"] == seed]
        screen.print(Text(title(of_seed[0])))
        for table in tables([live, *of_seed] if live else of_seed, screen.width):
            screen.print("", table)
        screen.print("", *(Text(sentence) for sentence in meaning(of_seed, BARE, live)), sep="\n")


@contextmanager
def _progress_bars() -> Iterator[Beginning]:
    """Yield a function that draws a bar of ended requests on stderr for each run, if stderr is a terminal."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield lambda label, total: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,} of {task.total:,} requests"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as progress:

        def beginning(label: str, total: int) -> Callable[[int], None]:
            for task_id in progress.task_ids:
                progress.remove_task(task_id)
            task = progress.add_task(label, total=total)
            return lambda ended: progress.update(task, completed=ended)

        yield beginning
