"""The host store alone: what policies pay, what look-ahead is worth, and the traces that it is tried on."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from policies.eviction.cost import refetch_ns
from policies.eviction.lru import LRU
from policies.registry import POLICIES
from sidecar.errors import Misused
from sidecar.lab.sim.results import Request, total_cost
from tests.kit.belady import belady_by_size
from tests.kit.cases import first
from tests.worlds.store_traces import GENERATORS, RANK_BYTES, RANKS, by_popularity, in_bursts, of_clients
from tests.worlds.store_trial import miss_cost, table, trial


def letters(text: str) -> list[Request]:
    return [Request(letter, 10, 1.0) for letter in text]


def test_lru_pays_for_what_it_gave_up() -> None:
    """abcab with room for two: c takes a's place, a takes b's, b takes c's. Five misses."""
    assert miss_cost(LRU(), letters("abcab"), 20) == 5
    assert miss_cost(LRU(), letters("abcab"), 30) == 3


def test_look_ahead_spares_who_is_waiting() -> None:
    """With a waiting next, c takes b's place; what is waited for by nobody goes first, however recent."""
    assert miss_cost(LRU(), letters("abca"), 20, look_ahead=1) == 3
    assert miss_cost(LRU(), letters("abca"), 20) == 4


def test_of_those_who_wait_the_furthest_gives_way() -> None:
    """a is wanted before b, so b goes for c: one miss more, not two. A look-ahead that ends before b does the same."""
    assert miss_cost(LRU(), letters("abcab"), 20, look_ahead=9) == 4
    assert miss_cost(LRU(), letters("abcab"), 20, look_ahead=1) == 4


@pytest.mark.parametrize("seed", first(1, range(3)))
def test_who_sees_everything_is_belady_of_equal_sizes(seed: int) -> None:
    """With the whole trace in the queue every policy evicts what is wanted furthest in the future."""
    picks = by_popularity("zipf", 30, 1000, seed, 0.7)
    trace = [Request(request.key, 1, 1.0) for request in picks]
    best = belady_by_size(trace, 8)
    for name in POLICIES["eviction"]:
        assert trial(trace, 8 / 30, 1000, [name]).paid[name] == best


@pytest.mark.parametrize("name", list(GENERATORS))
def test_the_bound_is_below_everyone_and_the_default_is_near_the_best(name: str) -> None:
    """On each generator, at both capacities: within a tenth of the best of the others, and nobody below the bound."""
    trace = GENERATORS[name](8000, 5)
    for share in (0.1, 0.3):
        tried = trial(trace, share)
        assert tried.least <= tried.belady
        assert tried.least <= min(tried.paid.values())
        assert max(tried.paid.values()) <= total_cost(trace)
        assert tried.over_best("rate_per_byte") <= 1.1


@pytest.mark.parametrize("name", [name for name in GENERATORS if name.startswith("bursts")])
def test_a_backlog_is_worth_more_than_any_policy(name: str) -> None:
    """On bursts, with the next 1,024 requests known: at most 0.8 of what LRU pays that knows nothing."""
    trace = GENERATORS[name](8000, 5)
    for share in (0.1, 0.3):
        paid = trial(trace, share, 1024, ["rate_per_byte"]).paid["rate_per_byte"]
        assert paid <= 0.8 * trial(trace, share, 0, ["lru"]).paid["lru"]


def test_the_store_holds_the_largest_at_least() -> None:
    """A tenth of a few adapters may be less than one of them."""
    assert trial([Request("a", 100, 1.0), Request("b", 1, 1.0)], 0.1).capacity_bytes == 100


def test_sizes_and_costs_are_those_of_adapters() -> None:
    """Ranks 8 to 128 in equal numbers, 5.25 MB of each, fetched at 2 GB/s after 50 ms."""
    known = {request.key: request for request in by_popularity("power", 50, 5000, 1, 0.9)}
    assert Counter(request.size_bytes for request in known.values()) == {rank * RANK_BYTES: 10 for rank in RANKS}
    assert all(request.miss_cost == refetch_ns(request.size_bytes) for request in known.values())


def test_bursts_keep_their_shares() -> None:
    """A client's rate is Zipf's, however its requests are spread; half of all come from few."""
    trace = in_bursts(20, 30_000, 1, 1.0, 2.0)
    counted = Counter(request.key for request in trace)
    assert counted["a000"] == pytest.approx(30_000 / sum(1 / (number + 1) for number in range(20)), rel=0.1)
    assert list(counted.values()) != sorted(counted.values())


def test_bursts_are_bursts() -> None:
    """The same client follows itself more often than its share says; without spread it does not."""

    def repeats(variation: float) -> float:
        trace = in_bursts(50, 10_000, 1, 0.5, variation)
        return fmean(one.key == other.key for one, other in pairwise(trace))

    assert repeats(8.0) > 5 * repeats(1.0)


CLIENTS = "pool,client,t_s,rate_rps,cv,pat,a,b\n"


def recorded(tmp_path: Path, lines: str) -> Path:
    path = tmp_path / "clients.csv"
    path.write_text(CLIENTS + lines)
    return path


def test_clients_become_adapters(tmp_path: Path) -> None:
    """Three quarters of the requests are of the client with three quarters of the rate; a slice takes some windows."""
    path = recorded(tmp_path, "p,3,0,30,1,Gamma,1,1\np,7,0,10,1,Gamma,1,1\np,9,600,40,1,Gamma,1,1\n")
    counted = Counter(request.key for request in of_clients(path, 8000, 1))
    assert sum(counted.values()) == pytest.approx(8000, rel=0.05)
    assert counted["client-003"] == pytest.approx(3000, rel=0.06)
    assert counted["client-009"] == pytest.approx(4000, rel=0.06)
    first = Counter(request.key for request in of_clients(path, 8000, 1, slice(0, 1)))
    assert set(first) == {"client-003", "client-007"}
    assert sum(first.values()) == pytest.approx(8000, rel=0.05)


@pytest.mark.parametrize(("variation", "expected"), [(0.0, 0.3), (2.0, 2.0), (700.0, 8.0)])
def test_a_recorded_spread_is_believed_within_limits(tmp_path: Path, variation: float, expected: float) -> None:
    """Gaps between a client's requests, told by the clock of another that sends a hundred times as often, regularly."""
    path = recorded(tmp_path, f"p,1,0,1,{variation},Gamma,1,1\np,2,0,100,0.3,Gamma,1,1\n")
    order = [request.key for request in of_clients(path, 200_000, 1)]
    at = [position for position, key in enumerate(order) if key == "client-001"]
    gaps = [after - before - 1 for before, after in pairwise(at)]
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(
    "lines", ["", "p,1,0,0,1,Gamma,1,1\n", "p,1,zero,1,1,,,\n", "p,1,0,nan,1,,,\n", "p,1,0,1,-1,,,\n", "p,1,0\n"]
)
def test_bad_recordings_are_refused(tmp_path: Path, lines: str) -> None:
    """Nobody sends anything, or what stands there is no number."""
    with pytest.raises(Misused, match=r"clients\.csv is not a trace"):
        of_clients(recorded(tmp_path, lines), 100, 1)


def test_the_table_has_a_line_for_each_run() -> None:
    """Every policy by name, every trace at two capacities and three look-aheads."""
    lines = list(table({"short": lambda: by_popularity("zipf", 20, 300, 1, 1.0)}))
    assert len(lines) == 1 + 6
    assert all(name[:10] in lines[0] for name in POLICIES["eviction"])
    assert {len(line) for line in lines} == {len(lines[0])}
