"""What happened when, in bounded memory."""

from __future__ import annotations

import random

import pytest

from sidecar.lab.sim.records import Series

BEGIN_NS = 1_000_000_000


def test_counts_are_by_interval_since_the_first() -> None:
    """The first thing noted begins the first interval."""
    series = Series(interval_ns=10, buckets_max=4)
    for at_ns in (BEGIN_NS, BEGIN_NS + 9, BEGIN_NS + 10, BEGIN_NS + 39):
        series.add("answered", at_ns)

    assert series.counts("answered") == [2, 1, 0, 1]
    assert series.counts("refused") == []


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_lost_when_intervals_double(seed: int) -> None:
    """Every count is kept, there are never more intervals than may be, and each is in its own."""
    source = random.Random(seed)
    times_ns = sorted(BEGIN_NS + source.randrange(100_000) for _ in range(300))
    series = Series(interval_ns=7, buckets_max=16)
    for number, at_ns in enumerate(times_ns):
        series.add(("answered", "refused")[number % 2], at_ns)

    for kind, times in (("answered", times_ns[::2]), ("refused", times_ns[1::2])):
        counts = series.counts(kind)
        assert len(counts) <= 16
        assert counts == [
            sum(1 for at_ns in times if (at_ns - times_ns[0]) // series.interval_ns == bucket)
            for bucket in range(len(counts))
        ]


def test_a_level_is_a_mean_over_each_interval() -> None:
    """Two for half an interval are one; the last interval is as long as the run was."""
    series = Series(interval_ns=10, buckets_max=8)
    series.change("running", BEGIN_NS, 2)
    series.change("running", BEGIN_NS + 5, -2)
    series.change("running", BEGIN_NS + 10, 4)
    series.change("running", BEGIN_NS + 22, -4)

    assert series.means("running", BEGIN_NS + 24) == [1.0, 4.0, 2.0]


@pytest.mark.parametrize("seed", range(5))
def test_a_level_keeps_its_integral_when_intervals_double(seed: int) -> None:
    """The mean over the run is what it was, at any interval."""
    source = random.Random(seed)
    fine, coarse = Series(interval_ns=10, buckets_max=1_000_000), Series(interval_ns=10, buckets_max=8)
    now_ns, level = BEGIN_NS, 0
    for _ in range(200):
        by = source.randrange(-level, 5) if level else 3
        for series in (fine, coarse):
            series.change("running", now_ns, by)
        level += by
        now_ns += source.randrange(1, 100)
    for series in (fine, coarse):
        series.change("running", now_ns, -level)

    sums = []
    for series in (fine, coarse):
        means, span_ns = series.means("running", now_ns), now_ns - BEGIN_NS
        last_ns = span_ns - (len(means) - 1) * series.interval_ns
        sums.append(sum(means[:-1]) * series.interval_ns + means[-1] * last_ns)
    assert sums[0] == pytest.approx(sums[1])
    assert len(coarse.means("running", now_ns)) <= 8
