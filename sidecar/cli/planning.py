"""`sidecar plan`: find the engines, slots and bytes with which a load meets its goals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.text import Text

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
from sidecar.cli.plan_tables import curve, engine_lines, missed, sidecar_lines, summary, trust
from sidecar.cli.show import AsJson, console, facts, print_json, titled
from sidecar.errors import Misused, Reason
from sidecar.lab.plan.goal import Goal
from sidecar.lab.plan.record import Record, record
from sidecar.lab.plan.search import BACKENDS_MAX, Found, Search, sidecar_for
from sidecar.lab.plan.settings import EMITTED, PLANNED
from sidecar.lab.plan.site import ENGINES, HOST_MEMORY_BYTES, check_slots, site_of
from sidecar.lab.sim.option_values import check_known, check_ranges, check_together, listed
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.setup import MODULES, Sidecar

_goal, _output = panel("What is enough"), panel("What to show")


def plan(
    p99_wait: Annotated[float | None, _goal("Seconds that 99 of 100 requests may wait for their first token.")] = None,
    wait_max: Annotated[float | None, _goal("Seconds that any request may wait.")] = None,
    throughput: Annotated[float | None, _goal("Output tokens per second, at least.")] = None,
    workload: Workload = None,
    trace: Annotated[
        Path | None,
        of_load(
            "CSV of arrival_s, adapter, input_tokens, output_tokens and perhaps tenant, gzip too; its busiest "
            "stretches count."
        ),
    ] = None,
    adapters: Adapters = None,
    requests: Annotated[int | None, of_load("Requests of a sample.", "2048 or more")] = None,
    in_flight: InFlight = None,
    rate: Rate = None,
    arrival_cv: ArrivalVariation = None,
    input_tokens: InputTokens = None,
    output_tokens: OutputTokens = None,
    input_cv: InputVariation = None,
    output_cv: OutputVariation = None,
    max_tokens: MaxTokens = None,
    skew: Skew = None,
    drift: Drift = None,
    tenants: Tenants = None,
    seeds: Annotated[str | None, of_load("A seed per sample; a trace is cut into as many parts.", "1,2,3")] = None,
    engine: Annotated[str | None, of_engines(f"{', '.join(ENGINES)}.", "trtllm")] = None,
    model: Model = None,
    gpu: Gpu = None,
    cost: Cost = None,
    model_config: Annotated[
        Path | None, of_engines("The model's config.json or its folder: it says how large an adapter is.")
    ] = None,
    backends: Annotated[int | None, of_engines("Consider only pools of so many engines.")] = None,
    backends_max: Annotated[int, of_engines("No more engines than these.", str(BACKENDS_MAX))] = BACKENDS_MAX,
    slots: Annotated[int | None, of_engines("Consider only so many slots.")] = None,
    seats: Seats = None,
    host_memory: Annotated[
        int | None, of_engines("Bytes of host memory for an engine's cache and the store.", str(HOST_MEMORY_BYTES))
    ] = None,
    rank: Annotated[int | None, of_engines("Rank of the adapters.", "16")] = None,
    ranks: Ranks = None,
    lora_modules: Annotated[str | None, of_engines(f"What adapters change: {', '.join(MODULES)}.", "qv")] = None,
    emit: Annotated[str | None, _output(f"Print only lines to paste: {', '.join(EMITTED)}.")] = None,
    plot: Annotated[Path | None, _output("Draw the curve into this file, .svg or .html; needs the extra lab.")] = None,
    as_json: AsJson = False,
) -> None:
    """Plan a pool: the engines, adapter slots, cache fractions and bytes with which a load meets its goals.

    Closed forms narrow the candidates; the rest are simulated with the core that serves. Exit 1: no pool meets the
    goals; the output names the nearest one and what limits it.
    """
    goal = Goal(wait_p99_s=p99_wait, wait_max_s=wait_max, tokens_per_s=throughput)
    _check(emit, engine, lora_modules, plot, backends_max, host_memory)
    check_together({"rank": rank, "ranks": ranks}, "rank", ("ranks",), "--ranks takes several")
    options = Options(
        workload=workload, trace=trace, adapters=adapters, requests=requests, in_flight=in_flight, rate=rate,
        arrival_cv=arrival_cv, input_tokens=input_tokens, output_tokens=output_tokens, input_cv=input_cv,
        output_cv=output_cv, max_tokens=max_tokens, skew=skew, drift=drift, tenants=listed("tenants", tenants, float),
        seeds=listed("seeds", seeds, int), engine=ENGINES[engine or "trtllm"], model=model, gpu=gpu, cost=cost,
        backends=backends, slots=slots, seats=seats, rank=rank, ranks=listed("ranks", ranks, int),
        lora_modules=lora_modules,
    )  # fmt: skip
    found, sidecar = _search(options, goal, model_config, host_memory or HOST_MEMORY_BYTES, backends_max)
    found_plan = record(found, sidecar)
    lines = EMITTED[emit](found, sidecar) if emit is not None else None
    if plot is not None:
        from sidecar.lab.plan.drawing import write_plot

        write_plot(found_plan, plot)
    _show(found_plan, lines, plot, as_json)
    if not found.meets:
        raise CommandError(missed(found_plan), Exit.FAILED, "GOAL_MISSED")


def _check(
    emit: str | None,
    engine: str | None,
    lora_modules: str | None,
    plot: Path | None,
    backends_max: int,
    host_memory: int | None,
) -> None:
    """Raise Misused for options that are wrong for any load."""
    check_known("emit", emit, EMITTED)
    check_known("engine", engine, ENGINES)
    check_known("lora_modules", lora_modules, MODULES)
    check_ranges({"backends": backends_max})
    if host_memory is not None and host_memory < 1:
        raise Misused(Reason.CONFIG_INVALID, f"--host-memory {host_memory}: expected bytes, 1 or more")
    if plot is not None:
        from sidecar.lab.plan.drawing import check_plot  # raises Misused if the plotting library is not installed

        check_plot(plot)
    planned = engine or "trtllm"
    own = PLANNED[planned]
    if emit not in (None, "helm", *own.pasted):
        able = next((name for name, each in PLANNED.items() if emit in each.pasted), "")
        otherwise = f", or plan with --engine {able}" if able else ""
        text = f"--emit {emit} is nothing that {planned} reads; take {own.others}{otherwise}"
        raise Misused(Reason.CONFIG_INVALID, text)


def _search(
    options: Options, goal: Goal, model_config: Path | None, host_memory_bytes: int, backends_max: int
) -> tuple[Found, Sidecar]:
    with _progress() as show:
        show("step times")
        site = site_of(
            options, model_config, host_memory_bytes, lambda what, done, total: show(f"{what}: {done} of {total}")
        )
        check_slots(site, options.slots)
        _check_reachable(goal, site.demand.asked_tokens_per_s)
        sidecar = sidecar_for(goal, site.demand.open_loop)
        search = Search(
            site,
            goal,
            sidecar,
            backends=options.backends,
            slots=options.slots,
            backends_max=backends_max,
            telling=show,
        )
        return search.run(), sidecar


def _check_reachable(goal: Goal, asked_tokens_per_s: float | None) -> None:
    """Raise Misused for a throughput goal above the requested tokens, which no pool can reach."""
    wanted = goal.tokens_per_s
    if wanted is not None and asked_tokens_per_s is not None and wanted > 1.05 * asked_tokens_per_s:
        raise Misused(
            Reason.CONFIG_INVALID,
            f"--throughput {wanted:,.0f} is more than arrivals ask for, {asked_tokens_per_s:,.0f} tokens/s; raise "
            "--rate, or plan for --in-flight",
        )


def _show(found_plan: Record, lines: str | None, plot: Path | None, as_json: bool) -> None:
    if as_json:
        print_json({**found_plan, **({} if lines is None else {"lines": lines})})
        return
    if lines is not None:
        print(lines, end="", flush=True)
        return
    screen = console()
    screen.print(Text(summary(found_plan)))
    for title, pairs in (("Engines", engine_lines(found_plan)), ("Sidecar", sidecar_lines(found_plan))):
        for part in titled(title, facts(pairs)):
            screen.print(part)
    for part in titled("Adapter memory against keys and values", curve(found_plan)):
        screen.print(part)
    for part in titled("What it rests on", facts(trust(found_plan))):
        screen.print(part)
    if plot is not None:
        screen.print(Text(f"\nThe plot: {plot}"))


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a progress callback that shows on stderr what is being simulated, if stderr is a terminal."""
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield lambda what: None
        return
    with errors.status("planning") as status:
        yield lambda what: status.update(f"planning: {what}")
