"""A plan as the JSON object that scripts read: figures, what limits them, and their basis.

Tables and drawings are made from it, so that all agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from statistics import median
from typing import Any

from sidecar.backends.openai.vllm import OLDEST, is_too_old
from sidecar.lab.calibrate.published import LORA, PUBLISHED_FOR
from sidecar.lab.calibrate.table import DECODE_TOLERANCE, PREFILL_TOLERANCE, TITLES
from sidecar.lab.engine.pages import pages_needed
from sidecar.lab.plan.candidates import Candidate
from sidecar.lab.plan.goal import Goal, Outcome
from sidecar.lab.plan.search import SLOWER, Found, Trial
from sidecar.lab.plan.settings import engine_settings, sidecar_settings
from sidecar.lab.sim.setup import KV_UNLIMITED_TOKENS, Sidecar, engine_rows
from sidecar.pace.cost_table import CostTable

Record = dict[str, Any]
BUSY = 0.95
"""The fraction of the full batches' output above which an engine is at its limit."""
MOSTLY = 0.5
CROWDED = 0.5
"""Running requests per slot; with more, slots are often all taken if adapters arrive at random."""
ANSWERS = 3.0
"""A sample shorter than this many answers ends before the pool is as full as it will be."""
LOSS_RANGES: dict[str, dict[int, tuple[float, float]]] = {"trtllm": {2: (0.141, 0.186), 7: (0.400, 0.477)}}
"""Published losses of throughput by module kinds, lowest and highest over ranks 8 to 64 (SqueezeBits, 2024-12).

For vLLM one loss is published for each of two ranks, and no range.
"""


def record(found: Found, sidecar: Sidecar) -> Record:
    """Return the record of a plan."""
    candidate = found.chosen.candidate
    return {
        "meets": found.meets,
        "goal": _goal(found.goal),
        "model": candidate.site.cost.table.model,
        "gpu": candidate.site.cost.table.gpu,
        "engine": candidate.site.cost.table.engine,
        "load": _load(candidate),
        "plan": _plan(candidate),
        "predicted": _predicted(found.chosen, found.goal),
        "slower": _slower(found),
        "binds": binding(candidate).value,
        "binds_because": sentence(candidate),
        "would_help": HELPS[binding(candidate)],
        "curve": [_point(trial, found.goal) for trial in found.curve],
        "settings": {"engine": engine_settings(candidate), "sidecar": sidecar_settings(found, sidecar)},
        "rests_on": rests_on(found),
        "warnings": warnings(found),
        "notes": list(candidate.site.demand.notes),
    }


def _goal(goal: Goal) -> Record:
    return {
        "wait_p99_s": goal.wait_p99_s,
        "wait_max_s": goal.wait_max_s,
        "throughput_tokens_per_s": goal.tokens_per_s,
    }


def _load(candidate: Candidate) -> Record:
    demand = candidate.site.demand
    return {
        "workload": demand.samples[0].load.name,
        "adapters": demand.adapters,
        "ranks": list(demand.ranks),
        "modules": list(candidate.site.modules),
        "input_tokens": demand.lengths.input_tokens,
        "output_tokens": demand.lengths.output_tokens,
        "in_flight": None if demand.open_loop else demand.in_flight,
        "asked_tokens_per_s": demand.asked_tokens_per_s,
    }


def _plan(candidate: Candidate) -> Record:
    site, engine = candidate.site, candidate.engine
    return {
        "backends": candidate.backends,
        "slots": candidate.slots,
        "adapters_fit": site.adapters_fit,
        "pages_by_rank": {str(rank): pages for rank, pages in site.layout.pages_by_rank.items()},
        "page_bytes": site.layout.page_bytes,
        "device_pages": candidate.device_pages,
        "device_bytes": engine.device_bytes,
        "host_pages": candidate.host_pages,
        "host_slots": engine.host_slots,
        "host_bytes": engine.host_bytes,
        "version_bytes": site.version_bytes or None,
        "versions_max": candidate.versions_max,
        "seats": site.seats,
        "kv_tokens": _tokens(candidate),
        "kv_seats": _finite(candidate.kv_seats),
        "store": {"memory_bytes": candidate.store_bytes, "disk_bytes": candidate.disk_bytes},
    }


def _predicted(trial: Trial, goal: Goal) -> Record:
    outcomes, candidate = trial.outcomes, trial.candidate
    return {
        "throughput_tokens_per_s": spread(outcomes, lambda each: each.tokens_per_s),
        "wait_p50_s": spread(outcomes, lambda each: each.wait_p50_s),
        "wait_p99_s": spread(outcomes, lambda each: each.wait_p99_s),
        "wait_max_s": spread(outcomes, lambda each: each.wait_max_s),
        "mean_batch": spread(outcomes, lambda each: each.mean_batch),
        "unanswered": sum(each.unanswered for each in outcomes),
        "headroom": _finite(trial.headroom(goal)),
        "bound_tokens_per_s": candidate.reachable.tokens_per_s,
        "spare_tokens_per_s": candidate.spare_tokens_per_s(goal.wait_s),
        "samples": [_outcome(each, goal) for each in outcomes],
    }


def _slower(found: Found) -> Record | None:
    if found.slower is None:
        return None
    return {"steps": SLOWER, **_outcome(found.slower, found.goal), "meets": found.goal.headroom(found.slower) >= 1}


def _outcome(outcome: Outcome, goal: Goal) -> Record:
    return {
        "seed": outcome.seed,
        "throughput_tokens_per_s": outcome.tokens_per_s,
        "wait_p50_s": _finite(outcome.wait_p50_s),
        "wait_p99_s": _finite(outcome.wait_p99_s),
        "wait_max_s": _finite(outcome.wait_max_s),
        "waits": outcome.waits,
        "unanswered": outcome.unanswered,
        "rising": outcome.rising,
        "headroom": _finite(goal.headroom(outcome)),
    }


def _point(trial: Trial, goal: Goal) -> Record:
    candidate, outcome = trial.candidate, trial.outcomes[0]
    return {
        "slots": candidate.slots,
        "device_bytes": candidate.engine.device_bytes,
        "kv_tokens": _tokens(candidate),
        "kv_seats": _finite(candidate.kv_seats),
        "bound_tokens_per_s": candidate.reachable.tokens_per_s,
        "throughput_tokens_per_s": outcome.tokens_per_s,
        "wait_p99_s": _finite(outcome.wait_p99_s),
        "wait_max_s": _finite(outcome.wait_max_s),
        "mean_batch": outcome.mean_batch,
        "binds": binding(candidate).value,
        "meets": goal.headroom(outcome) >= 1,
    }


def _tokens(candidate: Candidate) -> int | None:
    tokens = candidate.engine.kv_tokens
    return tokens if tokens < KV_UNLIMITED_TOKENS else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# What limits throughput or waits, and what would help.


class Binding(Enum):
    """What limits a plan; the value is its name in tables."""

    SLOTS = "slots"
    SEATS = "seats"
    KV = "KV"
    PREFILL = "prefill"
    IN_FLIGHT = "in flight"
    ARRIVALS = "arrivals"


HELPS = {
    Binding.SLOTS: "more slots for adapters on each engine, a smaller rank or more engines",
    Binding.SEATS: "more seats (the engine's max_batch_size) or more engines",
    Binding.KV: "fewer slots, shorter requests, a GPU with more memory or more engines",
    Binding.PREFILL: "shorter prompts or more engines",
    Binding.IN_FLIGHT: "more requests in flight: the engines can take them",
    Binding.ARRIVALS: "nothing in the plan: a single request takes that long, or many arrive at once",
}


def binding(candidate: Candidate) -> Binding:
    """Return what keeps a candidate's batches from being larger, or its waits from being shorter."""
    limit = _open_loop(candidate) if candidate.site.demand.open_loop else _closed_loop(candidate)
    return Binding.PREFILL if limit in (Binding.SEATS, Binding.KV) and _prompts_take_most(candidate) else limit


def sentence(candidate: Candidate) -> str:
    """Return what limits a candidate, with its numbers."""
    bound, demand = binding(candidate), candidate.site.demand
    hosted = math.ceil(demand.adapters / candidate.backends)
    what = {
        Binding.SLOTS: f"{candidate.slots:,} slots for about {hosted:,} adapters on each engine",
        Binding.SEATS: f"the {candidate.site.seats:,} seats of an engine",
        Binding.KV: f"keys and values: memory for {candidate.engine.kv_tokens:,} tokens, {candidate.kv_seats:,.0f} "
        "requests",
        Binding.PREFILL: f"prompts, which take {_prefill_share(candidate):.0%} of an engine's time",
        Binding.IN_FLIGHT: f"the {demand.in_flight:,} requests in flight",
        Binding.ARRIVALS: "nothing but the arrivals: the engines keep up with them",
    }
    return what[bound]


def _open_loop(candidate: Candidate) -> Binding:
    if candidate.depth > 1 and candidate.batch_asked > CROWDED * candidate.slots:
        return Binding.SLOTS
    asked = candidate.site.demand.asked_tokens_per_s or 0.0
    return _of_full_batches(candidate) if asked > BUSY * candidate.capacity_tokens_per_s else Binding.ARRIVALS


def _closed_loop(candidate: Candidate) -> Binding:
    outstanding = candidate.site.demand.in_flight / candidate.backends
    if candidate.reachable.batch >= candidate.full_batch:
        return _of_full_batches(candidate)
    return Binding.SLOTS if candidate.reachable.batch < outstanding else Binding.IN_FLIGHT


def _of_full_batches(candidate: Candidate) -> Binding:
    return Binding.KV if candidate.kv_seats < candidate.site.seats else Binding.SEATS


def _prompts_take_most(candidate: Candidate) -> bool:
    return _prefill_share(candidate) > MOSTLY


def _prefill_share(candidate: Candidate) -> float:
    """Return the fraction of an engine's time that prompts take in full batches."""
    lengths, batch = candidate.site.demand.lengths, candidate.full_batch
    prompt_ms = candidate.times.prefill_ms(lengths.input_tokens)
    return prompt_ms / (lengths.output_tokens * candidate.times.step_ms(batch, lengths.context) / batch + prompt_ms)


# How far a plan can be trusted: the variation of its figures, and their basis.


def spread(outcomes: Sequence[Outcome], of: Callable[[Outcome], float]) -> dict[str, float | None]:
    """Return the median, the least and the most of all samples; None stands for an endless wait."""
    values = sorted(of(outcome) for outcome in outcomes)
    named = {"median": median(values), "least": values[0], "most": values[-1]}
    return {name: value if math.isfinite(value) else None for name, value in named.items()}


def lora_loss(candidate: Candidate) -> dict[str, Any]:
    """Return the loss by which the step times were stretched, and its published range.

    `assumed` means that it was published for another model or GPU; `throughput_low` and `throughput_high` are the
    factors on throughput at the ends of the range.
    """
    table, kinds = candidate.site.cost.table, len(candidate.site.modules)
    lora, rank = table.lora, candidate.site.layout.max_rank
    row = min(range(len(lora.modules)), key=lambda index: abs(lora.modules[index] - kinds))
    (low_rank, *_, high_rank), (low, *_, high) = lora.ranks, lora.loss[row]
    part = min(1.0, max(0.0, (rank - low_rank) / (high_rank - low_rank)))
    share = low + part * (high - low)
    ends = _published_range(table, kinds)
    return {
        "share": share,
        "assumed": (table.model, table.gpu) != (PUBLISHED_FOR[0], TITLES[PUBLISHED_FOR[1]]),
        "published_range": None if ends is None else list(ends),
        "throughput_low": None if ends is None else (1 - ends[1]) / (1 - share),
        "throughput_high": None if ends is None else (1 - ends[0]) / (1 - share),
    }


def _published_range(table: CostTable, kinds: int) -> tuple[float, float] | None:
    for engine, ranges in LOSS_RANGES.items():
        if table.lora == LORA[engine].loss:
            return ranges.get(kinds)
    return None


def rests_on(found: Found) -> dict[str, Any]:
    """Return the basis of a plan."""
    candidate = found.chosen.candidate
    table, demand = candidate.site.cost.table, candidate.site.demand
    return {
        "cost": f"{table.model} on {table.gpu}, {table.engine}, {table.dtype}",
        "cost_sources": list(table.source),
        "interpolation_error": {"decode": DECODE_TOLERANCE, "prefill": PREFILL_TOLERANCE},
        "lora_loss": lora_loss(candidate),
        "steps_longer": SLOWER,
        "samples": [sample.load.seed for sample in demand.samples],
        "requests_of_a_sample": demand.samples[0].load.requests,
        "requests_of_the_load": demand.requests_in_all,
        "simulations": found.simulations,
        "requests_simulated": found.requests,
    }


def warnings(found: Found) -> list[str]:
    """Return warnings to read before a plan is used."""
    sentences = []
    if any(outcome.rising for outcome in found.chosen.outcomes):
        sentences.append("waits were still rising when the samples ended: simulate more --requests")
    sentences += _too_short(found)
    sentences += _more_in_pages(found.chosen.candidate)
    sentences += _of_an_old_engine(found.chosen.candidate.site.cost.table.engine)
    if found.meets and found.slower is not None and found.goal.headroom(found.slower) < 1:
        sentences.append(
            f"if steps take {SLOWER - 1:.0%} longer than in the cost file the goal is missed: the plan is tight"
        )
    return sentences


def _more_in_pages(candidate: Candidate) -> list[str]:
    """Return a warning if the engine's pages let more adapters run at once than its batches can take."""
    spec, rank = candidate.engine.spec(), min(candidate.site.demand.ranks)
    fit = spec.device_pages // pages_needed(engine_rows(candidate.engine.adapter_rows(rank)), spec.geometry)
    if spec.lora_slots is None or fit <= spec.lora_slots:
        return []
    return [
        f"an engine's pages hold {fit:,} adapters of rank {rank} and its batches take {spec.lora_slots:,}; where more "
        "meet, all running requests fail: let no client reach it except through the sidecar"
    ]


def _of_an_old_engine(measured: str) -> list[str]:
    """Return a warning if the step times are of an engine that the sidecar does not serve."""
    name, _, number = measured.partition(" ")
    if name != "vLLM" or not is_too_old(number):
        return []
    oldest = ".".join(map(str, OLDEST))
    return [
        f"the step times were measured with {measured}; the sidecar needs vLLM {oldest} or newer, of which none are "
        "published: your engine may be faster or slower, and sidecar calibrate makes a cost file of it"
    ]


def _too_short(found: Found) -> list[str]:
    """Return a warning if the samples end before the engines have filled up."""
    candidate = found.chosen.candidate
    demand = candidate.site.demand
    spans = [sample.span_s for sample in demand.samples if sample.span_s is not None]
    batch = min(candidate.batch_asked, candidate.full_batch)
    answer_s = demand.lengths.output_tokens * candidate.times.step_ms(max(1, batch), demand.lengths.context) / 1000
    if not spans or min(spans) > ANSWERS * answer_s:
        return []
    lasts = f"a sample is {min(spans):.0f} s of arrivals and an answer takes about {answer_s:.0f} s"
    return [f"{lasts}: simulate more --requests"]
