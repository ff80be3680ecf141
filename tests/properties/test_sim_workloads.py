"""Whatever the parameters: a load is what it says, and a file gives back what was written."""

from __future__ import annotations

import csv
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import Misused
from sidecar.lab.sim.traces import Row, rows_of, trace_workload
from sidecar.lab.sim.workloads import WORKLOADS, LoadParameters, workload

PARAMETERS = st.builds(
    LoadParameters,
    adapters=st.integers(1, 300),
    input_tokens=st.integers(1, 5000),
    output_tokens=st.integers(1, 5000),
    input_variation=st.floats(0, 8),
    output_variation=st.floats(0, 8),
    output_tokens_max=st.none() | st.integers(1, 9000),
    requests=st.integers(1, 200),
    seed=st.integers(0, 2**64),
    rate_per_s=st.none() | st.floats(1e-6, 1e6),
    arrival_variation=st.floats(0, 100),
    skew=st.none() | st.floats(0.001, 100),
    drift_requests=st.integers(0, 50),
    tenant_shares=st.lists(st.floats(0.01, 100), max_size=4).map(tuple),
    ranks=st.lists(st.integers(1, 256), min_size=1, max_size=4).map(tuple),
)


@given(st.sampled_from(sorted(WORKLOADS)), PARAMETERS)
def test_a_load_is_what_it_says(name: str, parameters: LoadParameters) -> None:
    """As many requests as announced, times that never fall, adapters that are listed, lengths within their limits."""
    load = workload(name, parameters)
    arrivals = list(load)
    assert len(arrivals) == load.requests == parameters.requests
    assert arrivals == list(load)
    assert load.open_loop == (parameters.rate_per_s is not None)
    assert set(load.ranks) == set(load.shares) == set(load.adapters)
    assert len(set(load.adapters)) == len(load.adapters)
    before_ns = 0
    for arrival in arrivals:
        assert arrival.adapter in (load.adapters or ("",))
        assert arrival.input_tokens >= 1
        assert 1 <= arrival.output_tokens <= arrival.output_tokens_max
        assert parameters.output_tokens_max in (None, arrival.output_tokens_max)
        assert (arrival.at_ns is None) != load.open_loop
        assert (arrival.at_ns or 0) >= before_ns or arrival.at_ns is None
        before_ns = arrival.at_ns or 0


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=20)
ROWS = st.lists(
    st.builds(Row, st.floats(0, 1e9), NAMES, st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1), NAMES), min_size=1
).map(lambda rows: sorted(rows, key=lambda row: row.arrival_s))


@given(ROWS)
def test_a_file_gives_back_what_was_written(rows: list[Row]) -> None:
    """Through the standard library's own CSV writer, quotes and all."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "load.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([Row._fields, *rows])
        assert list(rows_of(path)) == rows
        assert set(trace_workload(path).adapters) == {row.adapter for row in rows} - {""}


@given(st.binary(max_size=300), st.booleans())
def test_no_file_breaks_the_reader(content: bytes, has_header: bool) -> None:
    """Any bytes are a load or are refused with the file's name; nothing else is raised."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "load.csv"
        path.write_bytes(b"arrival_s,adapter,input_tokens,output_tokens\n" * has_header + content)
        said = what_becomes_of(path)
        assert said == "served" or str(path) in said


def what_becomes_of(path: Path) -> str:
    """Return why a trace is refused, or that it is served."""
    try:
        load = trace_workload(path)
    except Misused as refused:
        return refused.message
    return "served" if len(list(load)) == load.requests >= 1 else "lost"
