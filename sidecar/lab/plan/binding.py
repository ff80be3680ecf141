"""What stands in the way of more throughput or shorter waits, and what would help."""

from __future__ import annotations

import math
from enum import Enum

from sidecar.lab.plan.candidates import Candidate

BUSY = 0.95
"""Of what full batches give: who is asked for more is at the limit."""
MOSTLY = 0.5
CROWDED = 0.5
"""Requests that run, for each slot: with more, slots are often all taken where adapters come at random."""


class Binding(Enum):
    """What binds; the value is its name in tables."""

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
    Binding.IN_FLIGHT: "more requests at a time: the engines have room for them",
    Binding.ARRIVALS: "nothing that a plan decides: a request alone takes that long, or many come at once",
}


def binding(candidate: Candidate) -> Binding:
    """Return what keeps a candidate's batches from being larger, or its waits from being shorter."""
    limit = _open_loop(candidate) if candidate.site.demand.open_loop else _closed_loop(candidate)
    return Binding.PREFILL if limit in (Binding.SEATS, Binding.KV) and _prompts_take_most(candidate) else limit


def sentence(candidate: Candidate) -> str:
    """Return what binds, with its numbers."""
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
    """Return the share of an engine's time that prompts take in full batches."""
    lengths, batch = candidate.site.demand.lengths, candidate.full_batch
    prompt_ms = candidate.times.prefill_ms(lengths.input_tokens)
    return prompt_ms / (lengths.output_tokens * candidate.times.step_ms(batch, lengths.context) / batch + prompt_ms)
