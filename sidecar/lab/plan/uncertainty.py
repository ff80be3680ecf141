"""How far a plan can be trusted: what its figures vary by, and what they rest on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from sidecar.lab.calibrate.published import LORA, PUBLISHED_FOR
from sidecar.lab.calibrate.table import DECODE_TOLERANCE, PREFILL_TOLERANCE, TITLES
from sidecar.lab.plan.candidates import Candidate
from sidecar.lab.plan.goal import Outcome
from sidecar.lab.plan.search import SLOWER, Found
from sidecar.pace.cost_table import CostTable

ANSWERS = 3.0
"""A sample shorter than so many answers is over before the pool is as full as it will be."""
LOSS_RANGES: dict[str, dict[int, tuple[float, float]]] = {"trtllm": {2: (0.141, 0.186), 7: (0.400, 0.477)}}
"""Published losses of throughput by kinds of projection, lowest and highest over ranks 8 to 64 (SqueezeBits, 2024-12).

For vLLM one loss is published for each of two ranks, and no range.
"""


def spread(outcomes: Sequence[Outcome], of: Callable[[Outcome], float]) -> dict[str, float | None]:
    """Return the median, the least and the most of all samples; None stands for a wait without end."""
    values = sorted(of(outcome) for outcome in outcomes)
    named = {"median": median(values), "least": values[0], "most": values[-1]}
    return {name: value if math.isfinite(value) else None for name, value in named.items()}


def lora_loss(candidate: Candidate) -> dict[str, Any]:
    """Return the loss that the step times were stretched by, and the range that it was published with.

    `assumed` says that it was published for another model or GPU; `throughput_low` and `throughput_high` are what the
    ends of the range do to throughput, as factors.
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
    """Return what a plan rests on."""
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
    """Return what must be known of a plan before it is used."""
    says = []
    if any(outcome.rising for outcome in found.chosen.outcomes):
        says.append("waits were still rising when the samples ended: simulate more --requests")
    says += _too_short(found)
    if found.meets and found.slower is not None and found.goal.headroom(found.slower) < 1:
        says.append(
            f"if steps take {SLOWER - 1:.0%} longer than in the cost file the goal is missed: the plan is tight"
        )
    return says


def _too_short(found: Found) -> list[str]:
    """Return a warning where the samples end before engines have filled up with what arrives."""
    candidate = found.chosen.candidate
    demand = candidate.site.demand
    spans = [sample.span_s for sample in demand.samples if sample.span_s is not None]
    batch = min(candidate.batch_asked, candidate.full_batch)
    answer_s = demand.lengths.output_tokens * candidate.times.step_ms(max(1, batch), demand.lengths.context) / 1000
    if not spans or min(spans) > ANSWERS * answer_s:
        return []
    lasts = f"a sample is {min(spans):.0f} s of arrivals and an answer takes about {answer_s:.0f} s"
    return [f"{lasts}: simulate more --requests"]
