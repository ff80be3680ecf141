"""The table of a simulation in terminals of any width."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from sidecar.lab.sim.options import Options
from sidecar.lab.sim.runs import runs_of
from sidecar.lab.sim.simulate import simulate
from sidecar.lab.sim.tables import Figures, meaning, over, rows_of, tables, title

ORDERS = ("none", "fifo", "skip", "credit", "soft_gated")


@pytest.fixture(scope="module")
def figures() -> list[Figures]:
    """Return the figures of all orders on one small load."""
    options = Options(workload="zipf", compare=ORDERS, requests=200, input_tokens=64, output_tokens=16, adapters=12)
    return [simulate(run.setup, run.workload, run.label).as_json() for run in runs_of(options)]


def shown(figures: list[Figures], width: int) -> list[str]:
    """Return the lines shown in a terminal of this width."""
    screen = Console(file=io.StringIO(), width=width)
    for table in tables(figures, width):
        screen.print(table)
    assert isinstance(screen.file, io.StringIO)
    return [line.rstrip() for line in screen.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_nothing_is_cut_or_folded(figures: list[Figures], width: int) -> None:
    """Every row is one line, with a value for each run that fits; runs that don't fit come below."""
    rows = list(rows_of(figures))
    lines = shown(figures, width)
    heads = [line.split() for line in lines if set(line.split()) <= set(ORDERS)]
    assert [label for head in heads for label in head] == list(ORDERS)
    assert len(heads) == 1 or width < 160
    assert len(lines) == len(heads) * (1 + len(rows))
    assert all(len(line) <= width and "…" not in line for line in lines)
    for position, row in enumerate(rows):
        assert lines[1 + position].startswith(row.name)


def test_bounds_come_first(figures: list[Figures]) -> None:
    """The reachable bounds are above the results."""
    names = [row.name for row in rows_of(figures)]
    assert names[:3] == ["bound, all resident: tokens/s", "bound, closed form: tokens/s", "throughput: tokens/s"]


def test_rows_that_say_nothing_are_left_out(figures: list[Figures]) -> None:
    """A bare engine promises nothing and has no store; nobody was refused; one popularity knows no hot adapters."""
    bare = [row.name for row in rows_of(figures[:1])]
    assert not [name for name in bare if name.startswith(("promised", "store", "core", "  refused"))]
    assert "of hot adapters: p50" in bare
    even: Figures = {**figures[0], "wait_s": {**figures[0]["wait_s"], "hot": dict.fromkeys(("p50", "p99", "max"))}}
    assert "of cold adapters: p50" not in [row.name for row in rows_of([even])]


def test_a_column_may_lack_what_its_source_cannot_know(figures: list[Figures]) -> None:
    """A live run has waits and endings only."""
    live: dict[str, Any] = {
        "label": "live",
        "throughput_tokens_per_s": 12345.6,
        "wait_s": {"all": {"p50": 1.0, "p99": 2.0, "max": 3.0}, "hot": {"p50": None}, "cold": {}},
        "requests": {"offered": 3, "answered": 2},
    }
    cells = {row.name: row.cells[0] for row in rows_of([live, figures[-1]])}
    assert cells["throughput: tokens/s"] == "12,346"
    assert cells["waits for the first token, s: p50"] == "1.00"
    assert cells["  answered"] == "2"
    assert cells["mean batch"] == cells["bound, all resident: tokens/s"] == "–"
    caveat, gain, *_ = meaning([figures[-1]], "none", live)
    assert "calibrate --from-journal" in caveat
    assert f"{figures[-1]['label']} has" in gain


def test_gains_by_hand(figures: list[Figures]) -> None:
    """Each gain is a quotient; there is none without a divisor."""
    none = {"p99": None, "max": None}
    one: dict[str, Any] = {"throughput_tokens_per_s": 30.0, "wait_s": {"all": {"p99": 3.0, "max": 8.0}}}
    other: dict[str, Any] = {"throughput_tokens_per_s": 20.0, "wait_s": {"all": {"p99": 6.0, "max": 8.0}}}
    nobody: dict[str, Any] = {"throughput_tokens_per_s": 0.0, "wait_s": {"all": none}}
    assert over(one, other) == {"throughput": 1.5, "wait_p99": 0.5, "wait_max": 1.0}
    assert over(one, nobody) == {"throughput": None, "wait_p99": None, "wait_max": None}


def test_what_must_not_be_is_said(figures: list[Figures]) -> None:
    """The table asks to report a doubled answer or a request without an ending."""
    counts = {**figures[0]["requests"], "unfinished": 1}
    assert any("report it" in sentence for sentence in meaning([{**figures[0], "requests": counts}], "none"))
    assert not any("report it" in sentence for sentence in meaning(figures, "none"))


def test_the_title_says_what_was_simulated(figures: list[Figures]) -> None:
    """Model, GPU, engines, adapters, load and seed."""
    text = title(figures[0])
    for words in ("llama-3.1-8b", "1 × trtllm_no_evict", "8 slots", "12 adapters", "zipf, 200 requests", "seed 1"):
        assert words in text
