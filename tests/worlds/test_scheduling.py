"""The gains by order, placement, admission and the store: the claims of `make bench-scheduling`, each in a small run.

A run is as short as it can be with its goal still in reach; each is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from policies.ordering.soft_gated import SoftGated
from policies.views import Backlog, Promise, Waiting
from sidecar.lab.sim.options import Options
from sidecar.lab.sim.runs import runs_of
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
from tests.bench.scheduling.claims import Claim, Reading, rows_of

SEED = 1


def missed(readings: Sequence[Reading]) -> list[str]:
    """Return the claims that a run does not meet."""
    return [f"{row.claim.what}: {row.worst:.3f}" for row in rows_of(readings) if row.is_met is False]


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "requests"), [(2, 2560), (8, 2560), (32, 4096)])
def test_deep_backlog_gains_what_is_claimed(slots: int, requests: int) -> None:
    """Tokens/s over the bare engine, round robin over 64 adapters, 1,024 outstanding."""
    assert missed(deep.gain(slots, requests, SEED)) == []


@pytest.mark.slow
def test_nears_the_closed_form() -> None:
    """The order reaches its claimed share of the closed form."""
    assert missed(deep.share_of_closed_form(16, 3072, SEED)) == []


def test_does_no_harm_with_everything_resident() -> None:
    """With a slot for every adapter there is nothing to gain, and nothing lost."""
    assert missed(harmless.resident(256, 1024, SEED)) == []


@pytest.mark.slow
def test_does_no_harm_in_the_window_of_the_engine() -> None:
    """Nor is there a loss where the engine itself sees all requests."""
    assert missed(harmless.in_window("round_robin", 128, 8, 1536, SEED)) == []


@pytest.mark.slow
def test_gains_with_varied_lengths() -> None:
    """Stragglers hold slots; the gain stays."""
    assert missed(varied.gain(2048, SEED)) == []


def test_cold_adapters_wait_less_and_within_their_bound() -> None:
    """Two hot of eight: the longest wait, throughput, every bound kept, and one that is not idle."""
    assert missed(two_hot.longest_wait(two_hot.TOKENS, 0.8, two_hot.REQUESTS, SEED)) == []


@pytest.mark.slow
def test_a_bound_a_hundred_times_larger_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A meaningless promise is kept by every request, and the check notices it."""
    monkeypatch.setattr(SoftGated, "promise", _a_hundred_times(SoftGated.promise))
    (idle,) = missed(two_hot.longest_wait(two_hot.TOKENS, 0.8, two_hot.REQUESTS, SEED))
    assert idle.startswith("the wait nearest to its bound")


def _a_hundred_times(promise: Callable[..., Promise | None]) -> Callable[..., Promise | None]:
    def vague(self: SoftGated, request: Waiting, backlog: Backlog, now_ns: int) -> Promise | None:
        made = promise(self, request, backlog, now_ns)
        return None if made is None else replace(made, bound_ns=100 * made.bound_ns)

    return vague


@pytest.mark.parametrize(("hot", "slots"), [(1, 1), (6, 1), (6, 2)])
def test_a_flood_that_is_older_breaks_nobodys_bound(hot: int, slots: int, tmp_path: Path) -> None:
    """Its requests wait already when somebody asks for another adapter now and then, on an engine of four seats."""
    flood = [(number / 1000, f"hot-{number % hot}", "flood") for number in range(300)]
    others = [(2.0 + 5 * number, "cold", "other") for number in range(12)]
    lines = [f"{at_s},{adapter},100,150,{tenant}" for at_s, adapter, tenant in sorted(flood + others)]
    (tmp_path / "load.csv").write_text("\n".join(["arrival_s,adapter,input_tokens,output_tokens,tenant", *lines]))
    (run,) = runs_of(Options(trace=tmp_path / "load.csv", slots=slots, seats=4))
    recorder = tenants.watched(run.setup, run.workload)
    assert (recorder.bounded, recorder.over_bound) == (len(lines), [])


@pytest.mark.slow
def test_overload_is_refused_and_the_rest_served_in_time() -> None:
    """At three times the capacity: throughput, goodput, a retry delay, every bound kept."""
    readings = overload.overloaded(256, 3.0, "zipf", 2500, SEED)
    assert missed(readings) == []
    assert any("retry delay" in reading.claim.what for reading in readings), "nobody was refused"


@pytest.mark.slow
def test_routing_gains_over_a_random_spread() -> None:
    """Four backends, each adapter's requests where it lives; a load for each adapter and little more."""
    assert missed(pool.routed("round robin", 3584, SEED)) == []


@pytest.mark.slow
def test_tenants_that_wait_get_equal_shares() -> None:
    """One floods: Jain's index of those that are backlogged, and VTC's bound with the slack."""
    assert missed(tenants.flooded("zipf", (5.0, 1.0, 1.0), 2048, SEED)) == []


@pytest.mark.slow
def test_a_pool_recovers_from_a_lost_backend() -> None:
    """Throughput a minute after it is back, and how much moved for it."""
    assert missed(lost_backend.recovery("Zipf 1.0", 4600, SEED, lost_s=180)) == []


@pytest.mark.slow
def test_the_store_pays_little_more_than_the_best_policy() -> None:
    """On bursts, with the queue known and without; and less than LRU with it."""
    assert missed(stores.generated("bursts of CV 2, 60", 4000, SEED)) == []


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_order_and_bounds_hold_on_every_kind(kind: str) -> None:
    """Bounds are kept everywhere; at a PyTorch engine never more adapters than slots, whose bare batches fail."""
    readings = kinds.beside(kind, "two hot of eight, 2 slots, load 0.6", 400, SEED)
    assert missed(readings) == []
    failed = [reading.bare for reading in readings if reading.claim.what.endswith("batches that failed")]
    assert [bool(bare) for bare in failed] == ([True] if kind == "trtllm_pytorch" else [])


def test_a_third_adapter_starves_or_ends_what_runs() -> None:
    """Beside two hot ones at the bare engine, by whether it fits the pages; behind the sidecar neither."""
    starving, failing = (kinds.third(fills_pages, 400, SEED) for fills_pages in (True, False))
    assert missed([*starving, *failing]) == []
    bare = [[each.bare for each in of if each.claim.what.endswith("batches that failed")] for of in (starving, failing)]
    assert bare[0] == [0]
    assert bare[1] > [0]


def test_adapters_are_drawn_for_a_recorded_trace(tmp_path: Path) -> None:
    """Times and lengths are the trace's, a prompt no longer than a step; adapters are a seed's."""
    path = tmp_path / "day.csv"
    rows = [f"2023-11-16 18:17:{number % 60:02}.9799600,{300 * number},{number}" for number in range(60)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows[1:]]))
    readings = recorded.replayed("trtllm_pytorch", path, 50, SEED)
    assert missed(readings) == []
    assert {reading.seed for reading in readings} == {SEED}


@pytest.mark.slow
def test_many_requests_are_simulated_in_a_process_of_their_own() -> None:
    """The rate and the memory are those of the process; all requests are answered."""
    readings = million.simulated(1000, SEED)
    assert missed(readings) == []
    assert all(reading.value > 0 for reading in readings)


def test_rows_judge_by_the_worst_seed() -> None:
    """The worst of all runs is judged, or of each seed's best, or the best, where one run is enough."""
    usual = Claim(item="", what="usual", at_least=1.0)
    each = Claim(item="", what="one with each seed", at_most=1.0, best_of="seed")
    once = Claim(item="", what="one of all", at_most=0.5, best_of="all")
    values = ((1, 0.5), (1, 3.0), (2, 0.9), (2, 2.0))
    claims = (usual, each, once)
    rows = rows_of([Reading(claim=claim, seed=seed, value=value) for claim in claims for seed, value in values])
    assert [(row.worst, row.median, row.is_met) for row in rows] == [
        (0.5, 1.45, False),
        (0.9, 0.7, True),
        (0.5, 0.5, True),
    ]
