"""The first sentences of a report: the gain over the bare engine, the limiting factor, and warnings."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sidecar.lab.sim.bounds import all_resident, closed_form
from sidecar.lab.sim.records import SECOND_NS
from sidecar.lab.sim.report.formatting import count, listed, number, percent, seconds, times
from sidecar.lab.sim.report.runs import Run, first_bare
from sidecar.lab.sim.results import engines_of, step_times

ALIKE = 0.02
"""Throughputs that differ by less than this share are reported as equal."""
SATURATED = 0.98


def headline(runs: Sequence[Run]) -> str:
    """Return the headline: the best run's gain if the bare engine ran on the same arrivals, else its throughput."""
    best, bare = best_run(runs), first_bare(runs)
    if bare is None or best.is_bare or not best.same_arrivals(bare) or not bare.tokens_per_s:
        return f"{best.name}: {number(best.tokens_per_s)} output tokens a second, {_of_bound(best)}"
    ratio = best.tokens_per_s / bare.tokens_per_s
    if abs(ratio - 1) >= ALIKE:
        return f"{best.name} gives {times(ratio)} the throughput of the bare engine"
    longest = _ratio_of_waits(best, bare, "max")
    if longest is None or abs(longest - 1) < ALIKE:
        return f"{best.name} gives the throughput of the bare engine, and the same longest wait"
    return f"{best.name} gives the throughput of the bare engine; its longest wait is {times(longest)} as long"


def summary(runs: Sequence[Run]) -> list[str]:
    """Return the sentences under the headline."""
    best, bare = best_run(runs), first_bare(runs)
    sentences = []
    if bare is not None and not best.is_bare and best.same_arrivals(bare):
        sentences.append(
            f"{number(best.tokens_per_s)} against {number(bare.tokens_per_s)} output tokens/s on the same arrivals"
            f"{_waits(best, bare)}."
        )
        sentences.append(f"That is {_of_bound(best)}.")
    if unanswered := _unanswered(best):
        sentences.append(unanswered)
    return sentences


def bindings(runs: Sequence[Run]) -> list[str]:
    """Return sentences on the factor that limits throughput, and on the runs' batches."""
    first = runs[0]
    sentences = [what_binds(first)]
    if asked := _load(first):
        sentences.append(asked)
    reachable = _closed_batch(first)
    batches = [f"{run.label} {number(run.figures['mean_batch'])}" for run in runs]
    sentences.append(f"Mean batch of an engine, of {number(reachable)} reachable: {listed(batches)}.")
    return sentences


def warnings(runs: Sequence[Run]) -> list[str]:
    """Return warnings: exceeded wait bounds, doubled answers, requests without an ending."""
    found = []
    for run in runs:
        recorder = run.result.recorder
        broken = {
            "waited longer than its bound": len(recorder.over_bound),
            "got a doubled answer": recorder.counts["doubled"],
            "had no ending": len(recorder.unfinished),
        }
        found += [f"{run.label}: {count(times_, 'request')} {what}" for what, times_ in broken.items() if times_]
    return found


def best_run(runs: Sequence[Run]) -> Run:
    """Return the run with the highest throughput, of those with a sidecar if there are any."""
    return max([run for run in runs if not run.is_bare] or list(runs), key=lambda run: run.tokens_per_s)


def what_binds(run: Run) -> str:
    """Return a sentence on which of seats, KV memory, requests in flight and slots limits the closed form's batch."""
    setup, engine, adapters = run.result.setup, run.result.setup.engine, len(run.result.workload.adapters)
    in_flight, fitting = _in_flight(run), engine.kv_tokens / run.result.lengths().kept_tokens
    hosted, slots = max(1.0, adapters / setup.engines), min(engine.slots, max(1, adapters))
    limits = {
        f"the {engine.seats:,} seats of an engine": float(engine.seats),
        f"KV memory, which holds {fitting:,.0f} such requests": fitting,
        f"the requests in flight, {in_flight:,.0f}": in_flight / setup.engines,
    }
    if slots < hosted:
        what = f"the slots: {count(slots, 'slot')} for {count(hosted, 'adapter')} with {in_flight:,.0f} in flight"
        limits[what] = in_flight / setup.engines * 2 * slots / (hosted + slots)
    what, _ = min(limits.items(), key=lambda item: item[1])
    share = run.bound("closed_form") / run.bound("all_resident")
    resident = f"it is {percent(share)} of what is reachable with a slot for every adapter"
    if share > 1 - ALIKE / 2:
        resident = "with a slot for every adapter no more is reachable"
    return f"The closed form is bound by {what}, a batch of {number(_closed_batch(run))}; {resident}."


def asked_tokens_per_s(run: Run) -> float:
    """Return the output tokens/s that an open loop requests; infinity for a closed loop."""
    result = run.result
    counts = result.recorder.series.counts("offered")
    if not result.workload.open_loop or not counts:
        return math.inf
    return result.recorder.output_asked / (len(counts) * result.recorder.series.interval_ns / SECOND_NS)


def _load(run: Run) -> str:
    """Return a sentence on the tokens that an open loop requests; "" for a closed loop."""
    asked = asked_tokens_per_s(run)
    if asked == math.inf:
        return ""
    share = asked / run.bound("closed_form")
    sentence = f"Arrivals request {number(asked)} output tokens/s, {percent(share)} of the closed form"
    return sentence + ("." if share > SATURATED else ": no run can give more.")


def _in_flight(run: Run) -> float:
    return math.inf if run.result.workload.open_loop else float(run.result.setup.in_flight)


def _closed_batch(run: Run) -> float:
    result, adapters = run.result, len(run.result.workload.adapters)
    pace, lengths, engines = step_times(result.setup, adapters), result.lengths(), engines_of(result.setup)
    if not adapters:
        return all_resident(pace, lengths, engines, _in_flight(run)).batch
    return closed_form(pace, lengths, engines, adapters, _in_flight(run)).batch


def _of_bound(run: Run) -> str:
    """Return a run's throughput as a share of the bounds, or of the requested tokens if these are less."""
    most, resident, asked = run.bound("closed_form"), run.bound("all_resident"), asked_tokens_per_s(run)
    if asked < SATURATED * most:
        return f"{percent(run.tokens_per_s / asked)} of what the arrivals request"
    if run.tokens_per_s / most > 1 + ALIKE / 4:
        ratio = times(run.tokens_per_s / most)
        return f"{ratio} the closed form, which takes equal shares and a pass of its own for each prompt"
    if resident < most * (1 + ALIKE / 4):
        return f"{percent(run.tokens_per_s / resident)} of what is reachable"
    closed, share = percent(run.tokens_per_s / most), percent(run.tokens_per_s / resident)
    return f"{closed} of the closed form and {share} of all resident"


def _ratio_of_waits(run: Run, bare: Run, key: str) -> float | None:
    ours, theirs = (each.figures["wait_s"]["all"][key] for each in (run, bare))
    return ours / theirs if ours is not None and theirs else None


def _waits(run: Run, bare: Run) -> str:
    if _ratio_of_waits(run, bare, "p99") is None:
        return ""
    p99, longest = ([each.figures["wait_s"]["all"][key] for each in (run, bare)] for key in ("p99", "max"))
    return (
        f"; the 99th percentile of waits is {' against '.join(map(seconds, p99))}"
        f", the longest {' against '.join(map(seconds, longest))}"
    )


def _unanswered(run: Run) -> str:
    counts = run.figures["requests"]
    others = [f"{counts[kind]:,} {kind}" for kind in ("refused", "expired", "cancelled", "failed") if counts[kind]]
    if not others:
        return ""
    return f"{run.name} answered {counts['answered']:,} of {counts['offered']:,} requests; {listed(others)}."
