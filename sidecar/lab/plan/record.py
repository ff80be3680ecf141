"""A plan as the JSON object that scripts read; tables and drawings are made from it, so that all say the same."""

from __future__ import annotations

import math
from typing import Any

from sidecar.lab.plan.binding import HELPS, binding, sentence
from sidecar.lab.plan.candidates import Candidate
from sidecar.lab.plan.goal import Goal, Outcome
from sidecar.lab.plan.search import SLOWER, Found, Trial
from sidecar.lab.plan.settings import engine_settings, sidecar_settings
from sidecar.lab.plan.uncertainty import rests_on, spread, warnings
from sidecar.lab.sim.setup import KV_UNLIMITED_TOKENS, Sidecar

Record = dict[str, Any]


def record(found: Found, sidecar: Sidecar) -> Record:
    """Return everything that is known of a plan."""
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
